"""Pages that go to a tier below and come back up: the node's part, in plain memory and plain time."""

from collections.abc import Callable, Sequence

import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvd import wire
from kvd.daemon.gate import PROBE_PAGES
from kvd.daemon.sessions import Session
from kvd.pages import chain
from kvd.storage.arena import slot_bytes_for
from kvd.storage.tier import Name, Page
from tests.node_world import BRANCH, KEYS, World, namespace, spec

CHAINS = [*KEYS, BRANCH]
BIT = 2


class DictTier:
    """What the process of a lower tier answers, whenever the test lets it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ready = True
        self.pages: dict[Name, tuple[Page, list[bytes]]] = {}
        self._owed: list[Callable[[], None]] = []
        self.floor = 0.0
        self.density: Sequence[float] = ()
        self.tenants: dict[bytes, str] = {}
        self.kinds: dict[Name, int] = {}

    def judge(self, density: Sequence[float]) -> None:
        self.density = density

    def used(self, pages: Sequence[tuple[Name, int]]) -> None:
        self.kinds.update(pages)

    def belongs(self, namespace: bytes, tenant: str) -> None:
        self.tenants[namespace] = tenant

    def wants(self, density: float, before: int) -> bool:
        return density >= self.floor

    def load(
        self, length: int, wanted: Sequence[tuple[Name, list[int]]], done: Callable[[list[Page | None]], None]
    ) -> None:
        def answer() -> None:
            found: list[Page | None] = []
            for name, offsets in wanted:
                page, payloads = self.pages.get(name, (None, []))
                fits = page is not None and (page.length, page.shards) == (length, len(offsets))
                for offset, payload in zip(offsets, payloads if fits else [], strict=False):
                    self.world.memory[offset : offset + length] = payload
                found.append(page if fits else None)
            done(found)

        self._owed.append(answer)

    def store(self, pages: Sequence[tuple[Page, list[int]]], done: Callable[[list[bool]], None]) -> None:
        def answer() -> None:
            for page, offsets in pages:
                payloads = [bytes(self.world.memory[o : o + page.length]) for o in offsets]
                assert [xxhash.xxh3_128_digest(p) for p in payloads] == list(page.checksums), "not what was committed"
                self.pages[page.name] = (page, payloads)
            done([True] * len(pages))

        self._owed.append(answer)

    def answer(self, count: int = 1_000_000) -> None:
        """Answer what was asked so far, in order."""
        owed, self._owed = self._owed[:count], self._owed[count:]
        for answer in owed:
            answer()


class TwoTiers(World):
    """A node with a tier below."""

    def start(self) -> None:
        super().start()
        self.tier = DictTier(self)
        self.writeback = self.node.add_tier(BIT, self.tier, 1.0)
        self.node.promotion.clock = lambda: self.now

    def settle(self) -> None:
        """Time passes until everything is written back."""
        for _ in range(50):
            self.now += 1.0
            self.node.tick(self.now)
            self.tier.answer()
            if not len(self.writeback):
                return
        raise AssertionError("never idle")

    def lookup(self, session: Session, keys: list[bytes], ns: int = 0) -> int:
        request = wire.Lookup(1, ns, b"".join(keys), 10.0)
        return self.node.reading.lookup(session, request, self.now).pages

    def evict_all(self) -> None:
        """Everything leaves RAM that nobody holds."""
        for line in self.node.stock.departures.offers():
            while self.node.space.evict(line, 100, self.now):
                pass


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


def test_a_reader_gives_up_when_the_tier_is_much_slower_than_it_was(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    (lower,) = world.node.promotion.tiers
    lower.disk.observe(1 << 30, 1.0, world.now)
    told: list[int] = []
    request = wire.LeasePages(1, 0, b"".join(KEYS[0]), 5.0, 2.0)
    coming = world.node.reading.on_the_way(session, request, world.now)
    until = world.node.promotion.wait(coming, world.now + 2.0, lambda: told.append(1))
    assert world.now < until < world.now + 1.0
    world.now = until
    world.node.tick(world.now)
    assert told == [1]
    world.tier.answer()
    assert world.take(session, KEYS[0]) == [True] * 15, "what was on its way is there for the next"


def test_what_does_not_pay_is_not_given_out_and_the_tier_is_measured_beside_it(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    world.node.report(session, "closed", {"prefill_ns_per_token": 1000})
    assert world.lookup(session, KEYS[0]) == 0
    assert world.node.counters["gate_untried"] == 1
    world.now += 0.1
    world.tier.answer()
    (lower,) = world.node.promotion.tiers
    assert lower.disk.known
    assert len(world.node.residency) == PROBE_PAGES
    assert world.lookup(session, KEYS[0]) == PROBE_PAGES, "these are in RAM now, and the others do not pay"
    assert world.node.counters["gate_slower"] == 1
    world.now += 60
    assert world.lookup(session, KEYS[0]) == PROBE_PAGES
    world.now += 1e-6
    world.tier.answer()
    assert world.node.counters["gate_stale"] == 1
    assert len(world.node.residency) == 2 * PROBE_PAGES


def test_a_worker_that_has_just_started_is_judged_as_others_of_its_kind(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0] + KEYS[1])
    world.settle()
    world.evict_all()
    (lower,) = world.node.promotion.tiers
    lower.disk.observe(1 << 20, 1.0, world.now)
    world.node.report(session, "closed", {"prefill_ns_per_token": 1})
    assert world.lookup(session, KEYS[0]) == 0
    assert world.lookup(world.session(spec(1)), KEYS[0]) == 0
    assert world.node.counters["gate_slower"] == 2


def test_the_second_batch_of_a_prefix_is_not_charged_for_the_first(world: TwoTiers) -> None:
    session, other = world.session(spec(1)), world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    (lower,) = world.node.promotion.tiers
    lower.disk.observe(1 << 20, 0.5, world.now)
    page_s = spec(1).page_bytes / lower.disk.bytes_per_s
    for asker in (session, other):  # eight pages cost eight page_s, and all 15 save less than 20
        cost = int(1.5e9 * page_s / spec(1).page_tokens)
        world.node.report(asker, "closed", {"prefill_ns_per_token": cost})
    assert world.lookup(session, KEYS[0][:8]) == 8
    ask = wire.Lookup(1, 0, b"".join(KEYS[0][8:]), 10.0, 1.0, 8, KEYS[0][7])
    assert world.node.reading.lookup(other, ask, world.now).pages == 0, "it would wait for another's"
    assert world.node.reading.lookup(session, ask, world.now).pages == 7


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
