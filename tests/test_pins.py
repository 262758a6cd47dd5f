"""Prefixes that stay: in memory, on the disk, over a restart; and what each tenant holds. Through kvdctl."""

import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from kvd import wire
from kvd.daemon.group import Group
from kvd.daemon.pinning import MOST_WAITING, Pinning
from kvd.errors import Refused, SettingsError, Unavailable
from tests.harness import MIB, Daemon, eventually
from tests.kvdctl import RawWorker, on
from tests.node_world import KEYS, World, namespace, spec
from tests.test_nvme_node import nvme, ready, reboot, two_tiers, written

# -- the decisions, without a daemon ---------------------------------------------------------------------------


def chain_of(world: World, keys: list[bytes]) -> list[Group]:
    groups = [world.node.residency.get(namespace(1), key) for key in keys]
    return [group for group in groups if group is not None]


def test_a_page_of_two_pins_stays_until_both_are_gone(tmp_path: Path) -> None:
    world = World(pins_file=tmp_path / "pins")
    world.put(world.session(spec(1)), KEYS[0])
    short, long = KEYS[0][:3], KEYS[0][:6]
    world.node.pin(chain_of(world, short))
    world.node.pin(chain_of(world, long))
    world.node.pin(chain_of(world, long))
    assert [group.pins for group in chain_of(world, KEYS[0][:7])] == [2, 2, 2, 1, 1, 1, 0]
    assert world.node.unpin(namespace(1) + long[-1], world.now) == 3
    assert world.node.unpin(namespace(1) + short[-1], world.now) == 3
    assert [group.pins for group in chain_of(world, KEYS[0])] == [0] * 15
    with pytest.raises(Refused, match="no such pin"):
        world.node.unpin(namespace(1) + short[-1], world.now)
    assert world.node.faults() == []


def test_pins_outlive_kvd_and_wait_for_their_pages(tmp_path: Path) -> None:
    world = World(pins_file=tmp_path / "pins")
    session = world.session(spec(1))
    world.put(session, KEYS[0][:3])
    world.node.pin(chain_of(world, KEYS[0][:3]))
    world.node.pins.write(world.node.pins.chains())
    world.start()
    assert [group.pins for group in chain_of(world, KEYS[0][:3])] == [1, 1, 1]
    elsewhere = World(pins_file=tmp_path / "pins")
    elsewhere.put(elsewhere.session(spec(1)), KEYS[0][:2])
    assert [group.pins for group in chain_of(elsewhere, KEYS[0][:2])] == [1, 1]
    assert elsewhere.node.pins.listed() == [(namespace(1) + KEYS[0][2], 3, 2)]


def test_pins_may_not_take_more_than_half_of_memory(tmp_path: Path) -> None:
    world = World(extents=2, pins_file=tmp_path / "pins")
    world.put(world.session(spec(1)), KEYS[0][:8])
    with pytest.raises(Refused, match="more than half of memory"):
        world.node.pin(chain_of(world, KEYS[0][:8]))
    assert not any(group.pins for group in world.node.residency)


def asked(world: World, *requests: wire.Pin) -> list[wire.Message]:
    """What each is answered, all of them being asked before the first is."""

    async def answers() -> list[wire.Message]:
        pinning, found = Pinning(world.node), asyncio.Queue[wire.Message]()
        for request in requests:
            pinning.begin(request, found.put_nowait)
        job = asyncio.create_task(pinning.answer_forever())
        answered = [await asyncio.wait_for(found.get(), 10) for _ in requests]
        job.cancel()
        return answered

    return asyncio.run(answers())


def test_a_pin_that_cannot_be_remembered_is_refused(tmp_path: Path) -> None:
    world = World(pins_file=tmp_path / "missing" / "pins")
    world.put(world.session(spec(1)), KEYS[0][:3])
    (refusal,) = asked(world, wire.Pin(namespace(1), KEYS[0][2]))
    assert isinstance(refusal, wire.Refusal)
    assert "cannot write" in refusal.reason
    assert not any(group.pins for group in world.node.residency)
    assert not world.node.pins.listed()


def test_without_a_thread_to_write_with_a_pin_is_refused_and_kvd_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    world = World(pins_file=tmp_path / "pins")
    world.put(world.session(spec(1)), KEYS[0][:3])
    pin = wire.Pin(namespace(1), KEYS[0][2])
    with monkeypatch.context() as limits:
        limits.setattr(threading.Thread, "start", none_left)
        first, second = asked(world, pin, pin)
    assert isinstance(first, wire.Refusal)
    assert "can't start new thread" in first.reason
    assert second == first, "the next one is answered too"
    assert not any(group.pins for group in world.node.residency)
    assert isinstance(asked(world, pin)[0], wire.Pinned)


def test_pins_asked_for_together_end_as_the_last_has_it_in_memory_and_in_the_file(tmp_path: Path) -> None:
    world = World(pins_file=tmp_path / "pins")
    world.put(world.session(spec(1)), KEYS[0][:4])
    short, long = (wire.Pin(namespace(1), KEYS[0][at]) for at in (1, 3))
    no_more = wire.Pin(namespace(1), KEYS[0][1], keep=False)
    answers = asked(world, short, long, no_more, short, no_more, no_more)
    kinds = [wire.Pinned, wire.Pinned, wire.Pinned, wire.Pinned, wire.Pinned, wire.Refusal]
    assert [type(answer) for answer in answers] == kinds
    assert world.node.pins.listed() == [(namespace(1) + KEYS[0][3], 4, 4)]
    world.start()
    assert world.node.pins.listed() == [(namespace(1) + KEYS[0][3], 4, 4)]
    assert [group.pins for group in chain_of(world, KEYS[0][:4])] == [1] * 4


def test_who_asks_for_pins_without_end_is_refused(tmp_path: Path) -> None:
    pinning = Pinning(World(pins_file=tmp_path / "pins").node)
    request = wire.Pin(namespace(1), KEYS[0][0])
    for _ in range(MOST_WAITING):
        pinning.begin(request, lambda _: None)
    with pytest.raises(Refused, match="too many pins"):
        pinning.begin(request, lambda _: None)


@pytest.mark.parametrize(
    "text", ["{", "[]\n", '{"namespace": "00", "keys": []}\n', '{"namespace": "x", "keys": ["1"]}\n']
)
def test_a_file_that_holds_no_pins_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "pins").write_text(text)
    with pytest.raises(SettingsError, match="holds no pins of kvd") as refused:
        World(pins_file=tmp_path / "pins")
    assert str(tmp_path / "pins") in str(refused.value)


# -- through a daemon ------------------------------------------------------------------------------------------


def test_a_pinned_prefix_stays_while_others_come_and_go(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        keys = worker.put(5)
        ran = on(daemon, "pin", keys[-1].hex()[:12])
        assert ran.returncode == 0, ran.stderr
        assert "pinned: 5 pages" in ran.stdout
        capacity = daemon.status().tiers[0].bytes_total // (64 << 10)
        for first in range(1, 2 * capacity // 50 + 2):
            worker.put(50, first=100_000 * first)
        assert daemon.status().counters["ram_evicted"] > 0
        (held,) = json.loads(on(daemon, "pins", "--json").stdout)["pins"]
        assert (held["pages"], held["in_ram"]) == (5, 5)
        assert "unpinned: 5 pages" in on(daemon, "unpin", keys[-1].hex()[:8]).stdout
        assert on(daemon, "pins").stdout == "Nothing is pinned.\n"
        nothing = on(daemon, "unpin", "abcdef")
        assert (nothing.returncode, "no pin begins with" in nothing.stderr) == (1, True)
    assert daemon.faults() == []


def test_a_file_of_pins_that_hangs_holds_up_its_pin_alone(tmp_path: Path) -> None:
    with two_tiers(tmp_path, pins_file=tmp_path / "pins") as daemon, RawWorker(daemon) as worker:
        keys = worker.put(5)
        hangs = tmp_path / "pins.new"
        os.mkfifo(hangs)  # nobody reads it: opening it for writing waits, as long as we like
        with ThreadPoolExecutor(1) as pool, closing(daemon.tool()) as link, closing(daemon.tool()) as others:
            pin = pool.submit(link.ask, wire.Pin(worker.spec.digest, keys[-1]), wire.Pinned, 60.0)
            eventually(lambda: len(others.ask(wire.GetPins(), wire.Pins, 5.0).pins) == 1, 20, "kvd answers others")
            worker.put(5, first=1000)
            assert (pin.done(), (tmp_path / "pins").exists()) == (False, False), "first written, then answered"
            with hangs.open() as reader:  # there it goes on, and fails: this is no file
                reader.read()
            with pytest.raises(Refused, match="cannot write"):
                pin.result(20)
        assert on(daemon, "pins").stdout == "Nothing is pinned.\n"
        hangs.unlink()
        assert on(daemon, "pin", keys[-1].hex()).returncode == 0
        assert daemon.faults() == []


def test_kvd_ends_while_its_file_of_pins_hangs(tmp_path: Path) -> None:
    with two_tiers(tmp_path, pins_file=tmp_path / "pins") as daemon, RawWorker(daemon) as worker:
        keys = worker.put(5)
        os.mkfifo(tmp_path / "pins.new")
        with ThreadPoolExecutor(1) as pool, closing(daemon.tool()) as link, closing(daemon.tool()) as others:
            pin = pool.submit(link.ask, wire.Pin(worker.spec.digest, keys[-1]), wire.Pinned, 60.0)
            eventually(lambda: len(others.ask(wire.GetPins(), wire.Pins, 5.0).pins) == 1, 20, "it waits for the file")
            daemon.stop()
            with pytest.raises(Unavailable):
                pin.result(20)


def test_a_pinned_prefix_is_on_the_disk_after_its_memory_is_lost(tmp_path: Path) -> None:
    pins = tmp_path / "kept" / "pins"
    pins.parent.mkdir()
    with two_tiers(tmp_path, arena_mib=8, nvme__size_bytes=16 * MIB, pins_file=pins) as daemon:
        ready(daemon)
        with RawWorker(daemon) as worker:
            keys = worker.put(5)
            assert on(daemon, "pin", keys[-1].hex()).returncode == 0
            written(daemon, 5)
            for first in range(1, 9):
                worker.put(100, first=100_000 * first)
                eventually(lambda: nvme(daemon).counters["waiting_to_be_written"] == 0, 10)
            assert nvme(daemon).evicted > 0
        reboot(daemon)
        ready(daemon)
        (held,) = json.loads(on(daemon, "pins", "--json").stdout)["pins"]
        assert (held["pages"], held["in_ram"]) == (5, 0)
        with RawWorker(daemon) as worker:
            assert worker.found(keys) == 5


def test_what_tenants_hold_is_shown_next_to_their_shares(tmp_path: Path) -> None:
    shares = json.dumps({"raw": {"ram_reserve_bytes": MIB, "nvme_burst_bytes": 100_000}})
    with two_tiers(tmp_path, arena_mib=8, tenants=shares) as daemon:
        ready(daemon)
        with RawWorker(daemon, tenant="raw") as worker:
            worker.put(4)
            written(daemon, 4)
            expected = {
                "tenant": "raw",
                "tier": "ram",
                "held_bytes": 4 << 16,
                "reserve_bytes": MIB,
                "burst_bytes": None,
            }

            def both() -> bool:
                ram, disk = json.loads(on(daemon, "quota", "--json").stdout)
                return bool(ram == expected and disk["held_bytes"] == 4 << 16 and disk["burst_bytes"] == 100_000)

            eventually(both, 10)
            assert "above its burst: loses pages first" in on(daemon, "quota").stdout
