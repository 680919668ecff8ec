"""Turns: clients take turns, small requests go before large ones, and nothing is lost or reordered."""

from hypothesis import given
from hypothesis import strategies as st

from minter.tasks.turns import QUIET_SECONDS, Limits, Turns

LIMITS = Limits(requests=4, weight=100, small=10)


def turns(*items: tuple[str, int]) -> Turns[tuple[str, int]]:
    made: Turns[tuple[str, int]] = Turns(lambda i: i[0], lambda i: i[1], LIMITS)
    for item in items:
        made.add(item)
    return made


def test_clients_take_turns_in_each_batch() -> None:
    waiting = turns(*[("greedy", n) for n in range(1, 7)], ("honest", 1), ("other", 2))
    assert waiting.take(0) == [("greedy", 1), ("honest", 1), ("other", 2), ("greedy", 2)]
    assert waiting.of("greedy") == 4
    assert waiting.of("honest") == 0


def test_a_batch_is_full_by_weight_but_never_empty() -> None:
    waiting = turns(("a", 101), ("b", 60), ("a", 40), ("b", 60))
    assert [waiting.take(0) for _ in range(3)] == [[("a", 101)], [("b", 60), ("a", 40)], [("b", 60)]]


def test_small_ones_go_first_then_both_in_turn() -> None:
    waiting = turns(*[("large", 100)] * 3, *[("small", 1)] * 10)
    kinds = []
    while waiting:
        kinds.append(waiting.take(0)[0][0])
    assert kinds == ["small", "large", "small", "large", "small", "large"]


def test_large_ones_get_half_of_the_time_while_small_ones_come() -> None:
    waiting = turns(("small", 1), ("large", 100), ("large", 100))
    waiting.take(10.0)
    waiting.served(10.0, 10.1)
    assert waiting.take(10.1) == [("large", 100)]
    waiting.served(10.1, 10.4)
    assert waiting.take(10.4) == []
    assert round(waiting.wait_seconds(10.4), 3) == 0.3
    waiting.add(("small", 1))
    assert waiting.wait_seconds(10.4) == 0
    assert waiting.take(10.4) == [("small", 1)]
    assert waiting.take(10.71) == [("large", 100)]


def test_large_ones_get_all_of_the_time_when_no_small_one_comes() -> None:
    waiting = turns(("small", 1), ("large", 100), ("large", 100))
    waiting.take(10.0)
    waiting.served(10.0, 10.1)
    assert waiting.take(10.1) == [("large", 100)]
    waiting.served(10.1, 10.1 + QUIET_SECONDS)
    assert waiting.take(10.1 + QUIET_SECONDS) == [("large", 100)]


def test_what_is_put_back_comes_first_and_in_its_order() -> None:
    waiting = turns(("a", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5))
    batch = waiting.take(0)
    waiting.put_back(batch)
    assert len(waiting) == 5
    assert sorted(waiting.take(0)) == sorted(batch)
    assert waiting.clear() == [("a", 4)]
    assert not waiting


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 150)), max_size=60))
def test_every_request_is_served_once_and_in_the_order_of_its_client(items: list[tuple[str, int]]) -> None:
    waiting, served = turns(*items), []
    while waiting:
        batch = waiting.take(0)
        assert 0 < len(batch) <= LIMITS.requests
        assert len(batch) == 1 or sum(weight for _, weight in batch) <= LIMITS.weight
        served += batch
    for small in (True, False):
        of_line = [i for i in items if (i[1] <= LIMITS.small) is small]
        for client in "abc":
            assert [i for i in served if i[0] == client and i in of_line] == [
                i for i in of_line if i[0] == client
            ]
