"""A node of a shared tier whose clock is wrong for a while, or is set: what it refuses then is not for good."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvd.storage.tier import TierError
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


def test_a_node_whose_clock_is_behind_deletes_nothing_that_others_read(
    node: Node, tmp_path: Path, clock: Clock
) -> None:
    first = node("a")
    put(first, sample(1), sample(2))
    first.remove([sample(2).page.name])
    there = files(tmp_path)
    clock(-2 * DAY_S)
    tier = node("a", leftover_s=0, grace_s=0)
    for _ in range(3):
        tier.news()
    assert files(tmp_path) == there
    clock(0)
    assert get(node("c"), sample(1), sample(2)) == [sample(1), None]


def test_a_node_whose_clock_was_ahead_and_is_set_opens_its_tier_again_and_others_read_what_it_writes(
    node: Node, tmp_path: Path, clock: Clock
) -> None:
    reader = node("b")
    clock(2 * DAY_S)
    tier = node("a")
    put(tier, sample(1))
    there = files(tmp_path)
    clock(0)
    with pytest.raises(TierError, match="ahead of the clock"):  # which ends its process: kvd starts another
        tier.tend()
    tier = node("a", leftover_s=0)
    for _ in range(3):
        tier.tend()
    assert files(tmp_path) == there, "nothing is deleted because of a clock"
    assert put(tier, sample(1), sample(2)) == [True, True]
    assert reader.news().came == [sample(1).page.name, sample(2).page.name]
    assert get(reader, sample(1), sample(2)) == [sample(1), sample(2)]


def test_a_removed_page_does_not_come_back_with_a_file_of_the_future(
    node: Node, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(node("b"), sample(1))
    clock(2 * DAY_S)
    put(node("a"), sample(1))
    clock(0)
    reader = node("c")
    reader.remove([sample(1).page.name])
    later = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: later() + 3 * DAY_S)
    clock(3 * DAY_S)  # it was not set: so much time has passed
    reader.news()
    assert get(reader, sample(1)) == [None]
