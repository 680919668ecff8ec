"""Back-off doubles to its limit, varies by half, and begins again after a success."""

import pytest

from minter.backoff import Backoff


@pytest.mark.parametrize("jitter", [0.5, 1.0, 1.5])
def test_pauses_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch, jitter: float) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: {0.5: low, 1.0: 1.0, 1.5: high}[jitter])
    backoff = Backoff(0.1, 1.0)
    assert [backoff.pause() / jitter for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    backoff.reset()
    assert backoff.pause() == pytest.approx(0.1 * jitter)
