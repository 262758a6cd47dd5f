"""Which page leaves RAM: what is worth least first, leaves before parents, tenants within their shares, pins never."""

import msgspec
import pytest

from kvd import wire
from kvd.daemon.group import Group
from kvd.daemon.sessions import Session
from kvd.pages import chain
from kvd.storage.arena import slot_bytes_for
from kvd.storage.quota import Quotas, Share
from tests.node_world import KEYS, PAGES, World, namespace, spec

SLOT = slot_bytes_for(PAGES[1])


TENANTS = ("a", "small", "greedy", "other")


def of(tenant: str) -> wire.NamespaceSpec:
    return wire.NamespaceSpec(namespace(TENANTS.index(tenant)), PAGES[1], 4, 0, 1, "kv", "test", tenant=tenant)


def conversation(n: int, pages: int) -> list[bytes]:
    return chain([n, *range(4 * pages)], 4)[:pages]


def held(world: World, session: Session) -> int:
    return sum(group.owner == session.namespaces[0].tenant for group in world.node.residency)


@pytest.fixture
def capacity() -> int:
    """How many such pages a world has room for."""
    world = World()
    session = world.session(of("a"))
    while not world.node.counters["ram_evicted"]:
        world.now += 1.0
        world.put(session, conversation(int(world.now), 1))
    return len(world.node.residency)


def test_the_page_unused_for_longest_leaves_first(capacity: int) -> None:
    world = World()
    session = world.session(of("a"))
    for n in range(capacity):
        world.now += 1.0
        world.put(session, conversation(n, 1))
    world.now += 5.0
    assert world.take(session, conversation(0, 1)) == [True]
    world.now += 5.0
    world.put(session, conversation(1000, 1))
    assert world.take(session, conversation(0, 1)) == [True], "it was used"
    assert world.take(session, conversation(1, 1)) == [False]
    assert world.node.faults() == []


def test_a_long_conversation_leaves_from_its_end(capacity: int) -> None:
    world = World()
    session = world.session(of("a"))
    world.put(session, conversation(0, capacity))
    world.now += 100.0
    world.put(session, conversation(1, 2))
    left = world.take(session, conversation(0, capacity))
    assert left == sorted(left, reverse=True), "a page went before one that hangs below it"
    assert sum(left) < capacity
    assert world.node.faults() == []


def test_what_returns_is_kept_and_what_never_did_leaves(capacity: int) -> None:
    """Half the room returns every 50 s; one-off pages come in between, more than fit."""
    world = World()
    session = world.session(of("a"))
    often = [conversation(n, 1) for n in range(capacity // 2)]
    once = 10_000
    for _ in range(2000):
        for keys in often:
            world.now += 1.0
            if world.take(session, keys) == [False]:
                world.put(session, keys)
            once += 1
            world.put(session, conversation(once, 1))
        world.node.tick(world.now)
    hits = 0
    for keys in often:
        world.now += 1.0
        hits += world.take(session, keys) == [True]
    assert hits == len(often)
    assert world.node.faults() == []


def test_a_tenant_keeps_its_reserve_and_loses_above_its_burst(capacity: int) -> None:
    shares = {"small": Share(reserve_bytes=3 * SLOT), "greedy": Share(burst_bytes=5 * SLOT)}
    world = World(quotas=Quotas(shares))
    small, greedy, other = (world.session(of(tenant)) for tenant in ("small", "greedy", "other"))
    for n in range(4):
        world.put(small, conversation(n, 1))
    for n in range(100, 130):
        world.now += 1.0
        world.put(greedy, conversation(n, 1))
        world.put(other, conversation(100 + n, 1))
    assert held(world, small) >= 3
    assert held(world, greedy) <= 5
    assert held(world, small) + held(world, greedy) + held(world, other) == len(world.node.residency)
    assert world.node.stock.quotas.held("other") == held(world, other) * SLOT
    assert world.node.faults() == []


def test_after_a_restart_pages_are_their_tenants_again_once_a_worker_joins() -> None:
    world = World(quotas=Quotas({"a": Share(reserve_bytes=1)}))
    session = world.session(of("a"))
    world.put(session, KEYS[0][:3])
    world.quotas = Quotas({"a": Share(reserve_bytes=1)})
    world.start()
    assert {group.owner for group in world.node.residency} == {""}
    session = world.session(of("a"))
    assert held(world, session) == 3
    assert world.node.stock.quotas.held("a") > 0
    assert world.node.stock.quotas.held("") == 0
    assert world.node.faults() == []


def test_who_does_not_say_whose_pages_these_are_takes_them_from_nobody() -> None:
    world = World(quotas=Quotas({"a": Share(reserve_bytes=1)}))
    owner = world.session(of("a"))
    world.put(owner, KEYS[0][:3])
    nameless = world.session(msgspec.structs.replace(of("a"), tenant=""))
    world.put(nameless, conversation(1, 2))
    assert held(world, owner) == len(world.node.residency) == 5
    assert world.node.stock.quotas.held("") == 0
    assert world.node.faults() == []


def test_a_pinned_page_stays_and_with_it_all_before_it(capacity: int) -> None:
    world = World()
    session = world.session(of("a"))
    keys = conversation(0, 3)
    world.put(session, keys)
    tip = world.node.residency.get(session.namespaces[0].digest, keys[-1])
    assert tip is not None
    world.node.stock.departures.pin(tip)
    for n in range(1, 3 * capacity):
        world.now += 10.0
        world.put(session, conversation(n, 1))
    assert world.take(session, keys) == [True] * 3
    world.node.stock.departures.unpin(tip, world.now)
    for n in range(1000, 1000 + 3 * capacity):
        world.now += 10.0
        world.put(session, conversation(n, 1))
    assert world.take(session, keys) == [False] * 3
    assert world.node.faults() == []


def test_pages_leave_when_nobody_has_used_them_for_their_time_to_live() -> None:
    world = World(ttl_s=60.0)
    session = world.session(of("a"))
    world.put(session, KEYS[0])
    world.put(session, KEYS[1])
    world.now += 40.0
    assert all(world.take(session, KEYS[1]))
    world.now += 40.0
    world.node.tick(world.now)
    assert world.take(session, KEYS[0]) == [False] * len(KEYS[0])
    assert all(world.take(session, KEYS[1]))
    assert world.node.counters["ram_expired"] == len(KEYS[0])
    assert world.node.faults() == []


def group_of(world: World, session: Session, key: bytes) -> Group:
    group = world.node.residency.get(session.namespaces[0].digest, key)
    assert group is not None
    return group


def test_a_pin_keeps_its_extent_and_not_all_of_them_from_another_size() -> None:
    world = World(extents=2)
    worker = world.session(spec(1), spec(2, 0), spec(2, 1))
    pinned = conversation(0, 1)
    world.put(worker, pinned)
    world.node.stock.departures.pin(group_of(world, worker, pinned[0]))
    for n in range(1, 20):
        world.now += 1.0
        world.put(worker, conversation(n, 1))
    world.now += 100.0
    keys = KEYS[1][:4]
    assert (world.put(worker, keys, ns=1), world.put(worker, keys, ns=2)) == (4, 4)
    assert world.take(worker, pinned) == [True]
    assert world.node.faults() == []


def test_a_pin_into_an_extent_that_is_being_emptied_ends_that() -> None:
    world = World(extents=2)
    worker = world.session(spec(1), spec(2, 0), spec(2, 1))
    for n in range(20):
        world.now += 1.0
        world.put(worker, conversation(n, 1))
    oldest = min(world.node.residency, key=lambda group: group.last_use)
    world.now += 100.0
    leased = world.node.reading.lease(worker, wire.LeasePages(1, 0, oldest.key, 5.0), world.now)
    keys = KEYS[1][:4]
    world.put(worker, keys, ns=1)
    world.node.stock.departures.pin(oldest)
    world.node.reading.release(worker, leased.lease, [], world.now)
    world.now += 100.0
    assert (world.put(worker, keys, ns=1), world.put(worker, keys, ns=2)) == (4, 4)
    assert world.node.residency.by_place(oldest.place) is oldest
    world.node.stock.departures.unpin(oldest, world.now)
    assert world.put(worker, conversation(500, 3)) > 0, "its other slots are of use again"
    assert world.node.faults() == []


def test_a_full_index_gives_up_neither_a_new_page_nor_what_comes_before_it() -> None:
    world = World(extents=160, entries=1024)
    worker = world.session(of("a"))
    parent, child = chain(range(8), 4)
    _, other = chain([*range(4), *range(90, 94)], 4)
    world.put(worker, [parent, child])
    world.now += 50.0
    for n in range(1000, 1000 + 319):
        world.put(worker, conversation(n, 2))
    assert len(world.node.index) == 640, "one more does not fit"
    world.now += 10.0
    assert world.take(worker, [parent]) == [True]
    world.put(worker, [other], parent)
    assert world.take(worker, [parent, other]) == [True, True]
    assert world.node.faults() == []
