"""The node against a plain model: any order of requests, deaths and restarts; right bytes or none, and no leak."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvd import wire
from kvd.daemon.requests import MAX_HELD
from kvd.daemon.sessions import Session
from kvd.errors import PeerError, Refused
from kvd.pages import chain
from kvd.storage.arena import SUPERBLOCK_BYTES
from tests.node_world import BRANCH, EXTENT, KEYS, World, namespace, spec


class NodeMachine(RuleBasedStateMachine):
    """Workers put, take, stall and die; kvd restarts; time passes."""

    sessions = Bundle("sessions")
    open_writes = Bundle("open_writes")

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.alive: set[int] = set()

    @rule(target=sessions, shard=st.sampled_from([0, 1]))
    def connect(self, shard: int) -> Session:
        session = self.world.session(spec(2, shard), spec(1))
        self.alive.add(session.id)
        return session

    def _here(self, session: Session) -> bool:
        return session.id in self.alive

    @rule(
        session=sessions, which=st.sampled_from([*KEYS, BRANCH]), start=st.integers(0, 14), ns=st.sampled_from([0, 1])
    )
    def put(self, session: Session, which: list[bytes], start: int, ns: int) -> None:
        if self._here(session):
            self.world.put(session, which[start:], which[start - 1] if start else b"", ns)

    @rule(target=open_writes, session=sessions, which=st.sampled_from(KEYS), ns=st.sampled_from([0, 1]))
    def reserve(self, session: Session, which: list[bytes], ns: int) -> Any:
        if not self._here(session):
            return None
        return session, which, self.world.reserve(session, which, ns=ns), ns

    @rule(write=consumes(open_writes), step=st.sampled_from([1, 4, 64]))
    def commit(self, write: Any, step: int) -> None:
        if write and self._here(write[0]):
            session, keys, reserved, ns = write
            self.world.commit(session, keys, reserved, ns, step)

    @rule(session=sessions, which=st.sampled_from([*KEYS, BRANCH]), ns=st.sampled_from([0, 1]))
    def take(self, session: Session, which: list[bytes], ns: int) -> None:
        if not self._here(session):
            return
        promised = self.world.leading(which, session.namespaces[ns].digest)
        got = self.world.take(session, which, ns)
        assert all(got[:promised]), "what the index says must be there"

    @rule(session=sessions)
    def die(self, session: Session) -> None:
        if self._here(session):
            self.alive.discard(session.id)
            self.world.node.bury(session)
            assert self.world.node.leases.counts(session.id) == (0, 0)

    @rule(seconds=st.sampled_from([0.1, 4.0, 30.0, 90.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.node.tick(self.world.now)

    @rule()
    def restart(self) -> None:
        before = {group.namespace + group.key for group in self.world.node.residency}
        self.alive.clear()
        self.world.start()
        assert {group.namespace + group.key for group in self.world.node.residency} == before

    @rule(offset=st.integers(0, 6 * EXTENT), value=st.integers(1, 255))
    def flip_a_byte(self, offset: int, value: int) -> None:
        self.world.memory[SUPERBLOCK_BYTES + offset - 1] ^= value
        self.flipped = True

    flipped = False

    @invariant()
    def nothing_is_broken(self) -> None:
        if not self.flipped:  # flipped bytes break headers; what must hold then is checked by `take`
            assert self.world.node.faults() == []


class HonestMachine(NodeMachine):
    """Without flipped bytes, where all invariants must hold."""

    flip_a_byte = None


class FlippedMachine(NodeMachine):
    """With flipped bytes a restart may lose pages, and never serves wrong ones."""

    restart = None
    take = None

    @rule(session=NodeMachine.sessions, which=st.sampled_from([*KEYS, BRANCH]), ns=st.sampled_from([0, 1]))
    def take_or_miss(self, session: Session, which: list[bytes], ns: int) -> None:
        if self._here(session):
            self.world.take(session, which, ns)

    @rule()
    def restart_with_losses(self) -> None:
        self.alive.clear()
        self.world.start()


TestHonest = HonestMachine.TestCase
TestHonest.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestFlipped = FlippedMachine.TestCase
TestFlipped.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_eviction_takes_leaves_and_keeps_what_is_leased() -> None:
    world = World(extents=2)
    worker = world.session(spec(1))
    first, second = KEYS[0], KEYS[1]
    assert world.put(worker, first[:8]) == 8
    leased = world.node.reading.lease(worker, wire.LeasePages(1, 0, b"".join(first[:4]), 50.0), world.now)
    for n in range(6):
        world.now += 1
        world.put(worker, chain([n, 7, *range(100 * n, 100 * n + 50)], 4))
    assert world.node.counters["ram_evicted"] > 0
    assert world.take(worker, first[:4]) == [True] * 4
    assert world.leading(first, namespace(1)) >= 4
    world.node.reading.release(worker, leased.lease, [], world.now)
    assert world.put(worker, second) > 0
    assert world.node.faults() == []


def test_a_page_that_is_used_again_outlives_a_scan() -> None:
    world = World(extents=2)
    worker = world.session(spec(1))
    hot = KEYS[0][:3]
    world.put(worker, hot)
    for n in range(12):
        world.now += 1
        world.take(worker, hot)
        world.node.tick(world.now)
        world.put(worker, chain([n, 3, *range(1000 * n, 1000 * n + 14)], 4))
    assert world.node.counters["ram_evicted"] > 10
    assert world.take(worker, hot) == [True] * 3


def test_a_size_class_that_comes_late_gets_room() -> None:
    world = World(extents=3)
    worker = world.session(spec(1), spec(2, 0), spec(2, 1))
    for n in range(3):
        world.put(worker, chain([n, *range(60)], 4))
    assert world.node.arena.free_extents == 0
    world.now += 100
    keys = KEYS[1][:4]
    assert world.put(worker, keys, ns=1) == 4
    assert world.put(worker, keys, ns=2) == 4
    assert world.leading(keys, namespace(2)) == 4
    assert world.node.faults() == []


def test_a_stopped_workers_slots_come_back_and_its_late_commit_is_refused() -> None:
    world = World()
    slow, quick = world.session(spec(1)), world.session(spec(1))
    keys = KEYS[0][:3]
    reserved = world.reserve(slow, keys)
    assert world.put(quick, keys) == 0, "they are being written by somebody"
    world.now += 11
    world.node.tick(world.now)
    assert world.put(quick, keys) == 3
    assert world.commit(slow, keys, reserved) == 0, "it wakes up, writes where it was told to once, and is too late"
    assert world.node.counters["late_commits"] == 1
    # Five slots to the extent: the third page lies where the sleeper wrote. Its checksum says so.
    assert world.take(quick, keys) == [True, True, False]
    assert world.put(quick, keys) == 1
    assert world.take(quick, keys) == [True] * 3
    assert world.node.faults() == []


def test_a_damaged_page_is_quarantined_and_its_descendants_stay() -> None:
    world = World()
    worker = world.session(spec(1))
    keys = KEYS[0][:6]
    world.put(worker, keys)
    leased = world.node.reading.lease(worker, wire.LeasePages(1, 0, keys[2], 5.0), world.now)
    offset = wire.LEASED_ROW.unpack(leased.rows)[0]
    world.node.reading.release(worker, leased.lease, [], world.now)
    world.memory[offset + 17] ^= 1
    assert world.take(worker, keys) == [True, True, False, True, True, True]
    assert world.node.counters["corrupt_payload"] == 1
    assert world.leading(keys, namespace(1)) == 2
    assert world.take(worker, keys) == [True, True, False, True, True, True]
    assert world.put(worker, keys) == 1
    assert world.leading(keys, namespace(1)) == 6
    assert world.node.faults() == []


@pytest.mark.parametrize(
    "request_",
    [
        wire.LeasePages(1, 9, bytes(32), 1.0),
        wire.LeasePages(1, 0, b"", 1.0),
        wire.LeasePages(1, 0, bytes(33), 1.0),
        wire.LeasePages(1, 0, bytes(32), 1e9),
        wire.LeasePages(1, 0, bytes(32), float("nan")),
        wire.LeasePages(1, -1, bytes(32), 1.0),
    ],
)
def test_requests_out_of_bounds_cost_the_peer_its_session(request_: wire.LeasePages) -> None:
    world = World()
    worker = world.session(spec(1))
    with pytest.raises(PeerError):
        world.node.reading.lease(worker, request_, world.now)
    assert world.node.faults() == []


def test_a_page_larger_than_an_extent_is_refused_with_the_remedy() -> None:
    world = World()
    with pytest.raises(Refused, match="extent_bytes"):
        world.session(wire.NamespaceSpec(bytes(16), EXTENT * 2, 4, 0, 1, "kv", "huge"))


def test_namespaces_that_peers_announce_are_bounded() -> None:
    from kvd.daemon import labels

    known = labels.Labels()
    for n in range(labels.MOST + 10):
        digest = n.to_bytes(16, "big")
        known.add(wire.NamespaceSpec(digest, 1, 1, 0, 1, "kv", "x", digest))
    assert len(known) == labels.MOST
    assert known.get(bytes(16)) is None


def test_side_pools_leave_with_their_page() -> None:
    world = World(extents=2)
    family = bytes(16)
    kv = wire.NamespaceSpec(namespace(1), 9000, 4, 0, 1, "kv", "m", family)
    state = wire.NamespaceSpec(namespace(2), 4096, 4, 0, 1, "mamba", "m", family)
    worker = world.session(kv, state)
    keys = KEYS[0][:4]
    world.put(worker, keys[3:], ns=1)
    world.put(worker, keys)
    for n in range(3):
        world.now += 1
        world.put(worker, chain([n, 9, *range(500 * n, 500 * n + 18)], 4))
    assert world.take(worker, keys)[3] is False
    assert world.take(worker, keys[3:], ns=1) == [False]
    assert world.node.faults() == []


def test_making_room_for_another_size_is_done_in_small_steps() -> None:
    """One request never pays for a whole extent of small pages; a few in a row get their room."""
    from kvd.daemon.space import DRAIN_AT_ONCE, EVICT_AT_ONCE

    world = World(extents=80)
    worker = world.session(spec(1), spec(2, 0))
    world.session(spec(2, 1))
    single = wire.NamespaceSpec(namespace(9), 4096, 4, 0, 1, "kv", "small")
    world.node.join(worker, [single], 0.0)
    for n in range(12):
        world.put(worker, chain([n, 5, *range(398)], 4), ns=2)
    assert world.node.arena.free_extents == 0
    world.now += 1000
    stored, requests = 0, 0
    while stored < 4 and requests < 60:
        before = world.node.counters["ram_evicted"]
        requests += 1
        world.now += 0.01
        stored += world.put(worker, KEYS[requests % 4][:4])
        assert world.node.counters["ram_evicted"] - before <= 4 * (DRAIN_AT_ONCE + EVICT_AT_ONCE)
    assert stored >= 4, f"no room after {requests} requests"
    assert world.node.faults() == []


@pytest.mark.parametrize(
    ("wait_s", "before", "parent"),
    [(float("nan"), 0, b""), (-1.0, 0, b""), (1e9, 0, b""), (1.0, -1, b""), (1.0, 1 << 60, b""), (1.0, 1, b"short")],
)
def test_a_lookup_out_of_bounds_costs_the_peer_its_session(wait_s: float, before: int, parent: bytes) -> None:
    world = World()
    session = world.session(spec(1))
    with pytest.raises(PeerError):
        world.node.reading.lookup(session, wire.Lookup(1, 0, KEYS[0][0], 5.0, wait_s, before, parent), world.now)
    if before == 0:
        with pytest.raises(PeerError):
            world.node.reading.on_the_way(session, wire.LeasePages(1, 0, KEYS[0][0], 5.0, wait_s), world.now)


def test_a_peer_that_hoards_leases_is_dropped_and_its_lookups_cost_nothing() -> None:
    world = World()
    greedy, honest = world.session(spec(1)), world.session(spec(1))
    keys = KEYS[0][:3]
    world.put(honest, keys)
    lookup = wire.Lookup(1, 0, b"".join(keys), 5.0)
    assert world.node.reading.lookup(greedy, lookup, world.now).pages == 3
    for _ in range(MAX_HELD):
        world.node.reading.lease(greedy, wire.LeasePages(1, 0, keys[0], 50.0), world.now)
        assert world.node.reading.lookup(greedy, lookup, world.now).pages == 3
    assert world.node.leases.counts(greedy.id)[0] == MAX_HELD + 3, "a promise is one per page, however often given"
    with pytest.raises(PeerError, match="asks for more"):
        world.node.reading.lease(greedy, wire.LeasePages(1, 0, keys[0], 50.0), world.now)
    world.node.bury(greedy)
    assert world.take(honest, keys) == [True] * 3
    assert world.node.faults() == []


def test_a_promise_ends_with_the_read_that_it_was_for() -> None:
    world = World()
    session = world.session(spec(1))
    keys = KEYS[0][:3]
    world.put(session, keys)
    for _ in range(2):
        world.node.reading.lookup(session, wire.Lookup(1, 0, b"".join(keys), 5.0), world.now)
    (line,) = world.node.stock.departures.offers()
    world.take(session, keys)
    assert world.node.space.evict(line, 3, world.now) == 0, "another lookup still waits for its read"
    world.take(session, keys)
    for _ in range(3):
        world.node.space.evict(line, 3, world.now)
    assert len(world.node.residency) == 0
