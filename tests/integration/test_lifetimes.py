"""How long tokens were needed, from the states that were reported."""

from datetime import timedelta

import pytest
from msgspec import structs

from minter.cli.lifetimes import FEW, recommended
from minter.database.connection import transaction
from minter.database.lifetimes import NeededTime, needed
from minter.service import Service
from tests.integration.test_mint import mint, submission


def test_waits_needs_and_late_tokens_are_measured_by_route(service: Service) -> None:
    mint(service, *(submission(f"f{n}", f"g{n}") for n in range(50)))
    with transaction(service.pool) as connection:
        connection.execute(
            "INSERT INTO token_states (jti, state, active_at, ended_at)"
            " SELECT jti, 'finished', now() + interval '100 s', now() + n * interval '10 s'"
            " FROM (SELECT jti, row_number() OVER (ORDER BY jti) + 20 AS n FROM tokens) t WHERE n > 30"
        )
        connection.execute(
            "UPDATE token_states SET ended_at = now() + interval '30 days'"
            " WHERE jti = (SELECT jti FROM token_states ORDER BY jti DESC LIMIT 1)"
        )
    (found,) = needed(service.pool, service.clock() - timedelta(hours=1))
    assert found.tokens == 190
    assert found.waited_median == pytest.approx(100, abs=30)
    assert found.needed_median == pytest.approx(1255, abs=30)
    assert found.needed_most == pytest.approx(30 * 86_400, abs=30)
    assert found.late == 1
    assert found.given_most >= found.given_median > 600
    assert needed(service.pool, service.clock() + timedelta(hours=1)) == []


def test_a_recommendation_has_a_quarter_to_spare_within_the_profiles_bounds() -> None:
    one = NeededTime("r", FEW, 1.0, 2.0, 3.0, 4000.0, 9000.0, 1.0, 1.0, 0)
    assert recommended(one) == 5400
    assert recommended(structs.replace(one, needed_999=1.0)) == 900
    assert recommended(structs.replace(one, needed_999=1e9)) == 192 * 3600
    assert recommended(structs.replace(one, tokens=FEW - 1)) is None
