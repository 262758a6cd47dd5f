"""Pages evicted by an operator's word: what goes, what stays, and in which order; in plain memory."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from kvd import wire
from kvd.daemon import eviction
from kvd.daemon.decisions import MOST, Decisions
from kvd.daemon.eviction import Selection, evict_names, evict_part
from kvd.daemon.gate import Prefill, decide
from kvd.daemon.speed import Disk
from kvd.errors import PeerError
from kvd.storage.lineage import following
from tests.test_lower import TwoTierMachine
from tests.test_node import BRANCH, KEYS, World, namespace, spec
from tests.two_tiers import TwoTiers


def evict(world: World, space: bytes = b"", key: bytes = b"") -> tuple[int, int]:
    """(evicted, held), rounds as `kvdctl evict` makes them."""
    evicted = 0
    while True:
        cursor, now, held = 0, 0, 0
        while cursor >= 0:
            part = evict_part(world.node.stock, world.node.sessions, Selection(space, key), cursor, world.now)
            cursor, now, held = part.next, now + part.pages, held + part.held
        evicted += now
        assert world.node.faults() == []
        if not now:
            return evicted, held


def there(world: World, keys: list[bytes], space: bytes) -> list[bool]:
    return [world.node.residency.get(space, key) is not None for key in keys]


@pytest.fixture
def world() -> World:
    world = World(16)
    for keys in (*KEYS, BRANCH):
        world.put(world.session(spec(1)), keys)
    return world


def test_a_page_goes_with_all_that_follow_it(world: World) -> None:
    assert evict(world, key=KEYS[0][4]) == (11 + len(BRANCH) - 4 - 1, 0)
    assert there(world, KEYS[0], namespace(1)) == [True] * 4 + [False] * 11
    assert there(world, BRANCH, namespace(1)) == [True] * 4 + [False] * (len(BRANCH) - 4)
    assert there(world, KEYS[1], namespace(1)) == [True] * 15
    assert world.leading(KEYS[0], namespace(1)) == 4


def test_what_is_leased_stays_with_what_comes_before_it(world: World) -> None:
    reader = world.session(spec(1))
    leased = world.node.reading.lease(reader, wire.LeasePages(1, 0, KEYS[0][9], 5.0), world.now)
    evicted, held = evict(world, key=KEYS[0][7])
    assert (evicted, held) == (5, 3)
    assert there(world, KEYS[0], namespace(1)) == [True] * 10 + [False] * 5
    world.node.reading.release(reader, leased.lease, [], world.now)
    assert evict(world, key=KEYS[0][7]) == (3, 0)


def test_what_a_lookup_holds_in_its_lease_table_stays(world: World) -> None:
    class Table:
        def live(self, now: float) -> set[int]:
            group = world.node.residency.get(namespace(1), KEYS[1][-1])
            assert group is not None
            return {group.place}

        def close(self) -> None: ...

    world.session(spec(1)).table = Table()
    assert evict(world, key=KEYS[1][0]) == (0, 15)
    assert world.leading(KEYS[1], namespace(1)) == 15


def test_a_namespace_goes_and_no_other(world: World) -> None:
    other = world.session(spec(2, 0), spec(2, 1))
    world.put(other, KEYS[0], ns=0)
    world.put(other, KEYS[0], ns=1)
    assert evict(world, space=namespace(2)) == (15, 0)
    assert there(world, KEYS[0], namespace(1)) == [True] * 15
    pages = len(world.node.residency)
    assert evict(world) == (pages, 0)
    assert world.node.arena.used_bytes == 0


def test_a_key_goes_in_all_namespaces_unless_one_is_named(world: World) -> None:
    for shard in (0, 1):
        world.put(world.session(spec(2, shard)), KEYS[1])
    assert evict(world, namespace(2), KEYS[1][0]) == (15, 0)
    assert there(world, KEYS[1], namespace(1)) == [True] * 15
    for shard in (0, 1):
        world.put(world.session(spec(2, shard)), KEYS[1])
    assert evict(world, key=KEYS[1][0]) == (30, 0)


def test_a_side_pools_pages_go_with_the_page_they_belong_to() -> None:
    world, family = World(16), bytes(range(16))
    kv, side = (
        wire.NamespaceSpec(namespace(n), 9000, 4, 0, 1, pool, "test", family) for n, pool in ((1, "kv"), (7, "swa"))
    )
    session = world.session(kv, side)
    world.put(session, KEYS[0])
    for key in KEYS[0][3:]:
        world.put(session, [key], ns=1)
    assert evict(world, key=KEYS[0][9]) == (6 + 6, 0)
    assert there(world, KEYS[0], namespace(7)) == [False] * 3 + [True] * 6 + [False] * 6


def test_it_is_done_in_parts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "AT_ONCE", 7)
    first = evict_part(world.node.stock, world.node.sessions, Selection(b"", b""), 0, world.now)
    assert (first.pages, first.held) == (7, 0)
    assert first.next >= 0
    assert evict(world)[1] == 0
    assert len(world.node.residency) == 0


def test_pages_that_came_up_while_a_tier_removed_them_leave_again() -> None:
    world = TwoTiers()
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    names = [namespace(1) + key for key in KEYS[0][5:]]
    world.node.stock.below_changed(2, [], names)
    evict_names(world.node.stock, world.node.sessions, random.sample(names, len(names)), world.now)
    assert there(world, KEYS[0], namespace(1)) == [True] * 5 + [False] * 10
    assert world.leading(KEYS[0], namespace(1)) == 5, "no tier is said to have them"
    assert world.node.faults() == []


class EvictingMachine(TwoTierMachine):
    """The same with an operator, who evicts from RAM and from the tier in the order of `kvdctl evict`."""

    @rule(keys=TwoTierMachine.chains, start=st.integers(0, 14))
    def evict_by_word(self, keys: list[bytes], start: int) -> None:
        world = self.world
        evict(world, key=keys[start])
        names = [name for name in world.tier.pages if name[16:] in keys[start:]]
        for name in names:
            del world.tier.pages[name]
        world.node.stock.below_changed(2, [], names)
        evict_names(world.node.stock, world.node.sessions, names, world.now)
        _, held = evict(world, key=keys[start])
        assert held or world.leading(keys, namespace(1)) <= start


TestEvicting = EvictingMachine.TestCase
TestEvicting.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    "request_",
    [
        wire.EvictPages(),
        wire.EvictPages(bytes(16), b"", True),
        wire.EvictPages(bytes(15)),
        wire.EvictPages(b"", bytes(32)),
        wire.RemoveBelow(),
        wire.RemoveBelow(b"", bytes(31)),
    ],
)
def test_what_names_nothing_or_contradicts_itself_is_refused(request_: wire.EvictPages | wire.RemoveBelow) -> None:
    with pytest.raises(PeerError):
        Selection.of(request_)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(0, 40))
def test_what_follows_a_page_is_found_from_parents_alone(parents: list[int], start: int) -> None:
    """Page n's parent is parents[n] - 1; also with rings, pages of no chain, and two pages of one key."""

    def name(number: int) -> bytes:
        return (number + 1).to_bytes(16, "big") + bytes(16)

    keys = [name(n % 31) for n in range(len(parents))]
    above = [name(parent - 1) if parent else bytes(32) for parent in parents]
    expected, size = {name(start)}, 0
    while size != len(expected):
        size = len(expected)
        expected |= {key for key, parent in zip(keys, above, strict=True) if parent in expected}
    found = following(name(start), np.array(keys, "S32"), np.array(above, "S32"))
    assert found == [n for n, key in enumerate(keys) if key in expected]


def test_the_ring_of_decisions_is_bounded_and_newest_first() -> None:
    ring, world = Decisions(), World()
    session = world.session(spec(1))
    for number in range(MOST + 9):
        ring.add(float(number), session, "kv", 2, decide(Disk(), number, 4096, 4, Prefill(0.0), 1.0))
    assert (len(ring), ring.total) == (MOST, MOST + 9)
    assert [made.at for made in ring.last(2)] == [MOST + 8.0, MOST + 7.0]
    assert len(ring.last(10_000)) == MOST
