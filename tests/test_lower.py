"""Pages that go to a tier below and come back up: the node's part, in plain memory and plain time."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvd import wire
from kvd.pages import chain
from tests.node_world import BRANCH, KEYS, namespace, spec
from tests.two_tiers import BIT, TwoTiers

CHAINS = [*KEYS, BRANCH]


@pytest.fixture
def world() -> TwoTiers:
    return TwoTiers()


def test_what_was_evicted_comes_back_from_below(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    assert len(world.node.residency) == 0
    assert world.leading(KEYS[0], namespace(1)) == 15, "the index shows it, in the tier below"
    assert world.lookup(session, KEYS[0]) == 15
    assert world.take(session, KEYS[0]) == [False] * 15, "not here yet"
    world.tier.answer()
    assert world.take(session, KEYS[0]) == [True] * 15
    assert world.node.faults() == []


def test_what_was_asked_for_is_held_when_it_comes(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    world.lookup(session, KEYS[0])
    world.tier.answer()
    world.evict_all()
    assert world.take(session, KEYS[0]) == [True] * 15
    world.now += 11
    world.node.tick(world.now)
    world.evict_all()
    assert len(world.node.residency) == 0


def test_a_page_in_ram_is_not_evicted_to_make_room_for_its_own_successors(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    world.lookup(session, KEYS[0][:8])
    world.tier.answer()
    world.now += 20
    world.node.tick(world.now)
    assert world.lookup(session, KEYS[0]) == 15
    world.tier.answer()
    assert world.take(session, KEYS[0]) == [True] * 15


def test_a_tier_that_has_lost_a_page_costs_a_miss_and_the_name(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    del world.tier.pages[namespace(1) + KEYS[0][4]]
    world.lookup(session, KEYS[0])
    world.tier.answer()
    assert world.take(session, KEYS[0]) == [True] * 4 + [False] + [True] * 10
    assert world.leading(KEYS[0], namespace(1)) == 4
    assert world.node.faults() == []


def test_a_tier_that_does_not_work_is_no_hit(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    world.tier.ready = False
    assert world.lookup(session, KEYS[0]) == 0
    world.tier.ready = True
    assert world.lookup(session, KEYS[0]) == 15


def test_a_tier_that_starts_anew_says_what_it_holds(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0] + KEYS[1])
    world.settle()
    world.lookup(session, KEYS[0])
    world.evict_all()
    world.node.stock.below_forgotten(BIT)
    assert world.lookup(session, KEYS[1]) == 0
    del world.tier.pages[namespace(1) + KEYS[0][0]]
    world.node.stock.below_changed(BIT, list(world.tier.pages), [])
    assert world.lookup(session, KEYS[1]) == 15
    world.writeback.everything(world.now)
    world.settle()
    assert namespace(1) + KEYS[0][0] in world.tier.pages, "what it lacks is written again"
    assert world.node.faults() == []


def test_a_reader_is_told_when_its_pages_are_here_or_time_is_up(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0] + KEYS[1])
    world.settle()
    world.evict_all()
    told: list[str] = []
    for name, keys in (("first", KEYS[0]), ("second", KEYS[1])):
        request = wire.LeasePages(1, 0, b"".join(keys), 5.0, 2.0)
        coming = world.node.reading.on_the_way(session, request, world.now)
        assert len(coming) == 15
        world.node.promotion.wait(coming, world.now + 2.0, lambda name=name: told.append(name))  # type: ignore[misc]
    world.tier.answer(1)
    assert told == ["first"]
    world.now += 2.5
    world.node.tick(world.now)
    assert told == ["first", "second"]
    world.tier.answer()
    assert told == ["first", "second"]


def test_a_page_of_several_shards_goes_down_and_comes_up_whole(world: TwoTiers) -> None:
    ranks = [world.session(spec(2, shard)) for shard in (0, 1)]
    for rank in ranks:
        world.put(rank, KEYS[0])
    world.settle()
    world.evict_all()
    assert [world.lookup(rank, KEYS[0]) for rank in ranks] == [15, 15]
    world.tier.answer()
    assert [world.take(rank, KEYS[0]) for rank in ranks] == [[True] * 15] * 2


def test_a_full_index_shows_what_is_in_ram_first() -> None:
    world = TwoTiers(extents=64, entries=1024)
    session = world.session(spec(1))
    names = [namespace(7) + key for key in chain(range(4 * 630), 4)]
    world.node.stock.below_changed(BIT, names, [])
    assert world.node.index.lower == 630
    for n in range(15):
        keys = chain([n, *range(159)], 4)
        assert world.put(session, keys) == 40
        assert world.node.faults() == []
        assert world.leading(keys, namespace(1)) == 40
    assert world.node.index.lower < 630
    assert world.node.counters["index_full"] == 0


class TwoTierMachine(RuleBasedStateMachine):
    """Any order of puts, lookups, reads, evictions, answers and losses: right bytes or a miss, and sound books."""

    @initialize()
    def begin(self) -> None:
        self.world = TwoTiers()
        self.session = self.world.session(spec(1))

    chains = st.sampled_from(CHAINS)

    @rule(keys=chains, start=st.integers(0, 14))
    def put(self, keys: list[bytes], start: int) -> None:
        self.world.put(self.session, keys[start:], keys[start - 1] if start else b"")

    @rule(keys=chains)
    def lookup(self, keys: list[bytes]) -> None:
        self.world.lookup(self.session, keys)

    @rule(keys=chains)
    def take(self, keys: list[bytes]) -> None:
        self.world.take(self.session, keys)  # asserts that the bytes are right

    @rule(keys=chains)
    def read_as_a_worker_does(self, keys: list[bytes]) -> None:
        promised = self.world.lookup(self.session, keys)
        self.world.tier.answer()
        assert sum(self.world.take(self.session, keys)) >= promised

    @rule(seconds=st.sampled_from([0.3, 2.0, 15.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.node.tick(self.world.now)

    @rule(count=st.integers(1, 4))
    def answer(self, count: int) -> None:
        self.world.tier.answer(count)

    @rule()
    def evict(self) -> None:
        self.world.evict_all()

    @rule(ready=st.booleans())
    def break_or_mend(self, ready: bool) -> None:
        self.world.tier.ready = ready

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if self.world.tier.pages:
            name = data.draw(st.sampled_from(sorted(self.world.tier.pages)))
            del self.world.tier.pages[name]
            self.world.node.stock.below_changed(BIT, [], [name])

    @rule()
    def start_the_tier_anew(self) -> None:
        self.world.node.stock.below_forgotten(BIT)
        self.world.node.stock.below_changed(BIT, list(self.world.tier.pages), [])
        self.world.writeback.everything(self.world.now)

    @invariant()
    def nothing_is_broken(self) -> None:
        assert self.world.node.faults() == []


TestTwoTiers = TwoTierMachine.TestCase
TestTwoTiers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
