"""A provider's budget is never exceeded, and its circuit breaker closes when the provider is back."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from minter.errors import SettingsError
from minter.providers.budgets import (
    FAILURES_TO_OPEN,
    HORIZON,
    MAX_PAUSE_SECONDS,
    USED_SHARE,
    Breaker,
    backoff_seconds,
    reserve,
)
from minter.providers.dialects import LEADS, PROVIDER_DIALECTS, Provider, lead_of

T0 = datetime(2026, 11, 22, 12, tzinfo=UTC)
PROVIDER: dict[str, Any] = {
    "name": "iam",
    "issuer": "https://iam.example.org/",
    "client_id": "minter",
    "secret_file": "s",
}


@settings(deadline=None)
@given(
    st.floats(0.1, 500),
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=20),
)
def test_no_second_has_more_than_the_budget(rate: float, asks: list[tuple[float, int, int]]) -> None:
    """Whatever processes ask, the slots are never closer than the budget allows."""
    due_at, now, given_out = T0, T0, []
    for pause, wanted, free in asks:
        now += timedelta(seconds=pause)
        slots = reserve(due_at, now, rate, wanted, free)
        assert 0 <= slots.count <= min(wanted, free)
        if slots.count:
            assert slots.first >= now
            assert slots.first < now + HORIZON
            given_out += [slots.first + n * slots.interval for n in range(slots.count)]
            due_at = slots.due_at
    for window in (1, 10):
        for start in given_out:
            inside = sum(start <= at < start + timedelta(seconds=window) for at in given_out)
            assert inside <= rate * USED_SHARE * window + 1


@given(st.floats(1, 1000))
def test_all_of_it_can_be_had(rate: float) -> None:
    due_at, now, count = T0, T0, 0
    while now < T0 + timedelta(seconds=20):
        slots = reserve(due_at, now, rate, 1000, 1000)
        if slots.count:
            count, due_at = count + slots.count, slots.due_at
        now += timedelta(seconds=0.05)
    assert count >= 0.95 * rate * 20 - 1


def test_what_was_not_used_is_not_saved_up() -> None:
    late = T0 + timedelta(hours=1)
    assert reserve(T0, late, 50, 1000, 1000).count <= 50 * HORIZON.total_seconds() + 1


def failed(breaker: Breaker, now: datetime, retry_after: float = 0.0) -> Breaker:
    return breaker.after(failed=True, now=now, retry_after=retry_after, jitter=lambda bound: bound)


def test_a_breaker_opens_after_failures_in_a_row_and_closes_after_a_probe() -> None:
    breaker = Breaker()
    bad: Any = max  # fails when it is called with one number
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker = failed(breaker, T0)
    assert breaker.state(T0) == "closed"
    assert breaker.after(failed=False, now=T0, retry_after=0, jitter=bad).failures == 0
    breaker = failed(breaker, T0)
    assert breaker.state(T0) == "open"
    assert breaker.after(failed=False, now=T0, retry_after=0, jitter=bad) == breaker  # sent before the pause
    assert failed(breaker, T0).open_until == breaker.open_until
    later = breaker.open_until
    assert later is not None
    assert breaker.state(later) == "half_open"
    probing = structs.replace(breaker, probed_until=later + timedelta(seconds=30))
    assert probing.state(later) == "open"
    assert probing.state(later + timedelta(seconds=30)) == "half_open"  # the trial process died
    assert probing.after(failed=False, now=later, retry_after=0, jitter=bad) == Breaker()
    again = failed(probing, later)
    assert again.open_until is not None
    assert again.open_until - later > later - T0


def test_pauses_grow_to_a_bound() -> None:
    breaker, now = Breaker(failures=FAILURES_TO_OPEN), T0
    for _ in range(30):
        breaker = failed(breaker, now)
        assert breaker.open_until is not None
        assert breaker.open_until - now <= timedelta(seconds=MAX_PAUSE_SECONDS)
        now = breaker.open_until
    assert breaker.state(now) == "half_open"


def test_retry_after_is_heeded_at_once() -> None:
    breaker = failed(Breaker(), T0, retry_after=40)
    assert breaker.open_until == T0 + timedelta(seconds=40)
    assert failed(Breaker(), T0, retry_after=100_000).open_until == T0 + timedelta(hours=1)
    many = breaker
    for _ in range(20):  # requests that were sent before the pause
        many = failed(many, T0, retry_after=40)
    assert many.pauses == breaker.pauses


def test_backoff_has_full_jitter() -> None:
    assert [backoff_seconds(n, lambda bound: bound) for n in (0, 1, 5, 100)] == [1, 2, 32, 300]
    assert backoff_seconds(5, lambda _: 0.0) == 0


@given(st.integers(1, 10 * 86400), st.integers(60, 86400))
def test_a_lead_is_known_and_leaves_some_life(life: int, margin: int) -> None:
    lead = lead_of(life, margin)
    assert lead in LEADS
    assert lead <= max(2 * life // 3, LEADS[0])


@pytest.mark.parametrize(
    ("life", "margin", "lead"),
    [(6 * 3600, 7200, 8100), (3600, 7200, 1800), (86400, 7200, 43200), (60, 7200, 60)],
)
def test_leads(life: int, margin: int, lead: int) -> None:
    assert lead_of(life, margin) == lead


BAD = {
    "unknown dialect": {"dialect": "oracle"},
    "no secret_file": {"secret_file": ""},
    "plain http": {"issuer": "http://iam.example.org/"},
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_provider_must_be(case: str) -> None:
    with pytest.raises(SettingsError, match=case):
        Provider(**PROVIDER | BAD[case]).check()


def test_each_dialect_says_where_it_is_from() -> None:
    assert all(d.source for d in PROVIDER_DIALECTS.values())
    assert not PROVIDER_DIALECTS["indigo-iam"].tried
