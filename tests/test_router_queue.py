"""Who is served next: priority, then shares, then order; nobody late, and never too many."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.router.queue import FairQueue, Ticket


def fill(queue: FairQueue[int], tenant: str, count: int, weight: float = 1.0, priority: int = 0) -> list[Ticket[int]]:
    return [queue.push(n, tenant, weight, priority, 100.0) for n in range(count)]


def served(queue: FairQueue[int], count: int) -> list[str]:
    found = [queue.pop(0.0) for _ in range(count)]
    return [ticket.tenant for ticket in found if ticket is not None]


def test_one_tenant_is_served_in_order() -> None:
    queue: FairQueue[int] = FairQueue(10)
    fill(queue, "a", 5)
    assert [ticket.item for _ in range(5) if (ticket := queue.pop(0.0))] == [0, 1, 2, 3, 4]
    assert queue.pop(0.0) is None


def test_who_may_not_yet_keeps_its_place() -> None:
    queue: FairQueue[int] = FairQueue(10)
    fill(queue, "a", 3)
    first = queue.pop(0.0, lambda item: item > 0)
    assert first is not None
    assert first.item == 1
    assert queue.pop(0.0, lambda item: item > 5) is None
    assert [ticket.item for _ in range(2) if (ticket := queue.pop(0.0))] == [0, 2]
    assert queue.faults() == []


def test_who_sends_a_thousand_waits_behind_itself() -> None:
    queue: FairQueue[int] = FairQueue(2000)
    fill(queue, "greedy", 1000)
    assert served(queue, 10) == ["greedy"] * 10
    fill(queue, "small", 2)
    assert served(queue, 4).count("small") == 2


def test_shares_are_kept() -> None:
    queue: FairQueue[int] = FairQueue(1000)
    fill(queue, "one", 300)
    fill(queue, "three", 300, weight=3.0)
    found = served(queue, 200)
    assert found.count("three") == pytest.approx(150, abs=2)


def test_who_always_has_one_waiting_gets_no_more_than_its_share() -> None:
    queue: FairQueue[int] = FairQueue(1000)
    fill(queue, "line", 200)
    fill(queue, "one", 1)
    found: list[str] = []
    for _ in range(100):
        found += served(queue, 1)
        if found[-1] == "one":
            fill(queue, "one", 1)
    assert found.count("one") == pytest.approx(50, abs=1)


def test_silence_saves_up_nothing() -> None:
    queue: FairQueue[int] = FairQueue(1000)
    fill(queue, "early", 1)
    fill(queue, "steady", 300)
    served(queue, 200)
    fill(queue, "early", 50)
    assert served(queue, 20).count("early") == pytest.approx(10, abs=1)


def test_who_could_not_be_served_for_a_while_has_saved_up_nothing() -> None:
    """And whoever is served then does not put the clock back for those who come."""
    queue: FairQueue[int] = FairQueue(1000)
    away = queue.push(-1, "away", 1.0, 0, 100.0)
    fill(queue, "steady", 300)
    for _ in range(100):
        assert (ticket := queue.pop(0.0, lambda item: item >= 0)) is not None
        assert ticket.tenant == "steady"
    fill(queue, "away", 100)
    assert queue.pop(0.0) is away
    fill(queue, "new", 100)
    found = served(queue, 30)
    assert [found.count(name) for name in ("away", "steady", "new")] == pytest.approx([10, 10, 10], abs=1)


def test_priority_comes_first() -> None:
    queue: FairQueue[int] = FairQueue(10)
    fill(queue, "low", 3)
    fill(queue, "high", 2, priority=1)
    assert served(queue, 5) == ["high", "high", "low", "low", "low"]


def test_too_many_cost_the_one_who_has_most() -> None:
    queue: FairQueue[int] = FairQueue(4)
    tickets = fill(queue, "many", 4)
    queue.push(9, "few", 1.0, 0, 100.0)
    assert queue.surplus() is tickets[-1]
    assert queue.surplus() is None
    (last,) = fill(queue, "many", 1)
    assert queue.surplus() is last
    assert queue.faults() == []


def test_too_many_cost_the_lowest_priority() -> None:
    queue: FairQueue[int] = FairQueue(2)
    (low,) = fill(queue, "low", 1)
    fill(queue, "high", 2, priority=5)
    assert queue.surplus() is low


def test_nobody_is_served_late() -> None:
    queue: FairQueue[int] = FairQueue(10)
    late = queue.push(0, "a", 1.0, 0, 5.0)
    queue.push(1, "a", 1.0, 0, 50.0)
    found = queue.pop(6.0)
    assert found is not None
    assert found.item == 1
    assert queue.expired(6.0) == [late]
    assert len(queue) == 0


def test_who_left_is_not_served() -> None:
    queue: FairQueue[int] = FairQueue(10)
    first, second = fill(queue, "a", 2)
    assert queue.remove(first)
    assert not queue.remove(first)
    assert queue.pop(0.0) is second


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove", "late"]), st.integers(0, 3), st.integers(0, 2))))
def test_whatever_happens_everybody_is_served_once_or_sent_away_once(steps: list[tuple[str, int, int]]) -> None:
    queue: FairQueue[int] = FairQueue(3)
    waiting: list[Ticket[int]] = []
    for now, (what, tenant, priority) in enumerate(steps):
        gone: list[Ticket[int] | None] = []
        if what == "push":
            waiting.append(queue.push(now, str(tenant), 1.0 + tenant, priority, now + 4.0))
            gone = [queue.surplus()]
        elif what == "pop":
            gone = [queue.pop(now)]
        elif what == "remove" and waiting:
            assert queue.remove(waiting[0])
            gone = [waiting[0]]
        elif what == "late":
            gone = list(queue.expired(now))
        for ticket in gone:
            if ticket is not None:
                waiting.remove(ticket)
        assert len(queue) == len(waiting)
        assert queue.faults() == []
