"""A node of a shared tier whose clock is wrong for a while, or is set: what it refuses then is not for good."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.shared_folder import Node, files, nodes
from tests.tier_samples import get, held, put, sample

DAY_S = 86_400.0
Clock = Callable[[float], None]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(tmp_path / "shared") as start:
        yield start


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets this machine's clock so many seconds ahead of the right time."""
    right = time.time

    def set_ahead(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: right() + seconds)

    return set_ahead


def test_a_node_that_was_started_with_a_clock_behind_reads_all_once_it_is_set(node: Node, clock: Clock) -> None:
    put(node("a"), sample(1))
    clock(-10 * DAY_S)
    tier = node("b")
    assert not held(tier)
    clock(0)
    assert tier.news().came == [sample(1).page.name]
    assert get(tier, sample(1)) == [sample(1)]


def test_a_clock_that_was_ahead_of_a_pages_time_does_not_refuse_pages_after_it_was_set(
    node: Node, clock: Clock
) -> None:
    tier = node("a", ttl_s=3600, grace_s=99)
    put(tier, sample(1))
    clock(10 * DAY_S)
    assert tier.news().left == [sample(1).page.name]
    clock(0)
    tier.news()
    assert put(tier, sample(1), sample(2)) == [True, True]
    assert get(tier, sample(1), sample(2)) == [sample(1), sample(2)]


def test_what_a_node_writes_after_its_clock_was_set_back_is_for_all(node: Node, clock: Clock) -> None:
    tier = node("a")
    clock(10 * DAY_S)
    put(tier, sample(1))
    clock(0)
    put(tier, sample(2))
    assert held(node("b")) == {sample(2).page.name}


def test_a_node_whose_clock_is_set_back_knows_what_the_others_know(node: Node, tmp_path: Path, clock: Clock) -> None:
    tier = node("a")
    samples = [sample(n) for n in range(10)]
    clock(10 * DAY_S)
    for what in samples:
        put(tier, what)
    tier.remove([samples[0].page.name])
    clock(0)
    assert set(tier.news().left) == {what.page.name for what in samples[1:]}
    assert put(tier, *samples[1:]) == [True] * 9
    there = files(tmp_path)
    for _ in range(3):
        tier.news()
    assert files(tmp_path) == there, "what nobody reads is not merged"
    late = node("b")
    assert get(late, *samples) == [None, *samples[1:]]
    assert "damaged" not in late.counters


def test_own_files_of_the_future_give_their_room_back_and_those_of_others_stay(
    node: Node, tmp_path: Path, clock: Clock
) -> None:
    clock(10 * DAY_S)
    put(node("a"), sample(1))
    put(node("b"), sample(2))
    clock(0)
    tier = node("a", leftover_s=0)
    tier.news()
    assert [path.parent.name for path in files(tmp_path)] == ["b"]
    assert tier.usage().bytes_used == files(tmp_path)[0].stat().st_size
