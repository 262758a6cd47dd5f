"""Pages on their way down: what is written, how much at once, and what a tier is told of worth."""

import pytest

from kvd.storage.arena import slot_bytes_for
from tests.node_world import KEYS, namespace, spec
from tests.two_tiers import TwoTiers


@pytest.fixture
def world() -> TwoTiers:
    return TwoTiers()


def test_a_queue_that_is_full_drops_the_oldest_and_nobody_waits(
    world: TwoTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvd.daemon.writeback.MAX_QUEUE", 10)
    session = world.session(spec(1))
    assert world.put(session, KEYS[0]) == 15
    assert world.node.counters["writes_back_dropped"] == 5
    world.settle()
    assert len(world.tier.pages) == 10


def test_a_tier_that_starts_anew_is_not_given_what_waits_twice(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0] + KEYS[1])
    waiting = len(world.writeback)
    for _ in range(3):
        world.writeback.everything(world.now)
    assert len(world.writeback) == waiting == 30


def batch(world: TwoTiers, seconds: float) -> int:
    """How many pages a batch has that takes so long."""
    before = len(world.tier.pages)
    world.node.tick(world.now)
    world.now += seconds
    world.tier.answer()
    return len(world.tier.pages) - before


def test_a_slow_tier_gets_small_batches_and_a_quick_one_large_ones(
    world: TwoTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.writeback._batch_bytes = slot = slot_bytes_for(spec(1).page_bytes)
    monkeypatch.setattr("kvd.daemon.writeback.BATCH_BYTES", 8 * slot)
    session = world.session(spec(1))
    world.put(session, KEYS[0] + KEYS[1])
    world.now += 1
    assert [batch(world, seconds) for seconds in (0.1, 0.1, 0.1, 4, 1, 8, 1)] == [1, 2, 4, 8, 2, 2, 1]


def test_a_full_batch_that_is_done_calls_for_the_next_at_once(
    world: TwoTiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvd.daemon.writeback._BATCH_PAGES", 10)
    world.writeback.more = lambda: world.writeback.tick(world.now)
    world.put(world.session(spec(1)), KEYS[0])
    world.now += 1
    world.node.tick(world.now)
    for written in (10, 15):  # and nobody ticks in between
        world.tier.answer()
        assert len(world.tier.pages) == written


def test_what_trickles_in_is_gathered_and_not_written_page_by_page(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.writeback.more = lambda: world.writeback.tick(world.now)
    world.put(session, KEYS[0][:1])
    world.now += 1
    world.node.tick(world.now)
    world.put(session, KEYS[0][:4])
    world.now += 1  # the other three are due while the first is being written
    world.tier.answer()
    world.tier.answer()
    assert len(world.tier.pages) == 1
    world.node.tick(world.now)
    world.tier.answer()
    assert len(world.tier.pages) == 4


def test_what_is_worth_less_than_what_would_leave_is_written_once_it_is_used_again(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.tier.floor = 1e9
    world.put(session, KEYS[0])
    world.settle()
    assert not world.tier.pages
    assert world.node.counters["not_worth_writing"] == len(KEYS[0])
    world.tier.floor = 0.0
    world.settle()
    assert not world.tier.pages, "nobody has asked for them since"
    world.take(session, KEYS[0])
    world.settle()
    assert len(world.tier.pages) == len(KEYS[0])


def test_a_tier_hears_what_was_learnt_and_which_of_its_pages_are_used(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    assert world.tier.density == world.node.stock.worth.ranks.density
    assert world.tier.kinds == {}
    world.now += 10.0
    world.take(session, KEYS[0][:5])
    world.node.tick(world.now)
    assert set(world.tier.kinds) == {namespace(1) + key for key in KEYS[0][:5]}
    world.tier.density = ()
    world.tier.ready = False
    world.node.tick(world.now)
    world.tier.ready = True
    world.node.tick(world.now)
    assert world.tier.density, "a tier that starts anew hears it again"
