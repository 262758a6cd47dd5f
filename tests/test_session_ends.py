"""What a session may hold, and that nothing of it is left when it has ended."""

import pytest

from kvd import wire
from kvd.daemon.leases import Leases
from kvd.daemon.requests import MAX_HELD
from kvd.errors import Unavailable
from tests.harness import Daemon, PluginProcess, span
from tests.node_world import KEYS, World, spec
from tests.two_tiers import TwoTiers


def test_a_lookup_that_finds_nothing_leaves_nothing() -> None:
    world = World()
    session = world.session(spec(1))
    assert world.node.reading.lookup(session, wire.Lookup(1, 0, b"".join(KEYS[0]), 10.0), world.now).pages == 0
    assert world.node.leases == Leases()
    world.node.bury(session)
    assert world.node.leases == Leases()


def test_pages_that_come_for_a_session_that_has_ended_are_not_held() -> None:
    world = TwoTiers()
    dies, lives = world.session(spec(1)), world.session(spec(1))
    world.put(dies, KEYS[0])
    world.settle()
    world.evict_all()
    assert (world.lookup(dies, KEYS[0]), world.lookup(lives, KEYS[0][:5])) == (15, 5)
    world.node.bury(dies)
    world.tier.answer()
    world.evict_all()
    assert len(world.node.residency) == 5
    assert world.node.faults() == []


def test_a_tool_that_ends_no_scan_is_dropped(daemon: Daemon, worker: PluginProcess) -> None:
    worker.do("put", keys=span(3))
    tool = daemon.tool()
    try:
        for _ in range(MAX_HELD):
            assert tool.ask(wire.Scan(0, 8), wire.Scanned, 5.0).lease
        with pytest.raises(Unavailable):
            tool.ask(wire.Scan(0, 8), wire.Scanned, 5.0)
    finally:
        tool.close()
    assert daemon.faults() == []
    assert worker.do("take", keys=span(3)) == ["right"] * 3
