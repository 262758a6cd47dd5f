"""A real kvd whose lower tier lies on a disk that hangs, or brings 2 MB/s: deadlines hold, and the tier comes back."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import wire
from tests import kvdctl
from tests.harness import MIB, Daemon, PluginProcess, eventually, span
from tests.kvdctl import RawWorker, doctor, of
from tests.loop_device import HANGS, Device, Throttle, loop_device, throttle

PAGES = 60
CONVERSATIONS = 40  # more than RAM holds
LOOKUP_S = 0.25  # the plugin's own deadlines are 5 ms a probe and 2 s a read; this machine is shared
READ_S = 1.8


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with loop_device(tmp_path) as device:
        yield device


@pytest.fixture
def disk(device: Device) -> Iterator[Throttle]:
    with throttle(device) as throttled:
        yield throttled


def node(device: Device, folder: Path, kind: str = "nvme", **settings: object) -> Daemon:
    """32 MiB of RAM, and a tier on the device."""
    tier = device.mount_point / "tier"
    (folder / "run").mkdir()  # on another disk
    kinds: dict[str, dict[str, object]] = {
        "nvme": {"nvme__path": tier, "nvme__size_bytes": 256 * MIB, "nvme__segment_bytes": 32 * MIB},
        "shared": {"shared__uri": tier, "shared__node": "n", "shared__quota_bytes": 256 * MIB},
    }
    return Daemon(folder / "run", 32, 4, **{**kinds[kind], f"{kind}__write_delay_s": 0.05, **settings})


def lower(daemon: Daemon) -> wire.TierStatus:
    return daemon.status().tiers[1]


def works(daemon: Daemon) -> None:
    eventually(lambda: not lower(daemon).trouble, 60, "the tier works")


def fill(daemon: Daemon, worker: PluginProcess) -> None:
    for conversation in range(CONVERSATIONS):
        worker.do("put", keys=span(PAGES, conversation))
        eventually(lambda n=conversation: lower(daemon).pages >= PAGES * (n + 1), 30, "all is written")


def read(worker: PluginProcess, conversation: int) -> set[str]:
    """As SGLang does: a lookup, which has pages fetched, then the read; neither may take longer than it says."""
    worker.do("exists", keys=span(PAGES, conversation))
    assert worker.seconds < LOOKUP_S
    answers = worker.do("take", keys=span(PAGES, conversation))
    assert worker.seconds < READ_S
    assert worker.do("circuit") == "closed", "kvd itself answers"
    return set(answers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nvme", "shared"])
def test_a_disk_that_hangs_costs_a_deadline_and_comes_back(
    device: Device, disk: Throttle, tmp_path: Path, kind: str
) -> None:
    with node(device, tmp_path, kind) as daemon, PluginProcess(daemon.socket) as worker:
        works(daemon)
        assert worker.do("wait")
        fill(daemon, worker)
        pid = daemon.status().pid

        disk.set(HANGS)
        seen: set[str] = set()
        for conversation in range(4):  # the oldest: RAM has lost them
            seen |= read(worker, conversation)
        assert seen == {"miss"}
        worker.do("put", keys=span(PAGES, 100))
        assert read(worker, 100) == {"right"}, "RAM does not care"
        eventually(lambda: "does its disk hang" in lower(daemon).trouble, 90, "its trouble is known")
        (red,) = of(doctor(daemon)[1], kind)
        assert red["level"] == "red"
        assert "disk does not answer" in red["remedy"]
        assert worker.do("exists", keys=span(PAGES, 0)) == 0, "no hit, so nobody waits any more"
        worker.do("put", keys=span(PAGES, 101))
        assert read(worker, 101) == {"right"}
        assert daemon.faults() == []

        disk.set(0)
        works(daemon)
        eventually(lambda: lower(daemon).counters["waiting_to_be_written"] == 0, 60, "what RAM has is written")
        assert of(doctor(daemon)[1], kind)[0]["level"] == "green"
        for conversation in (*range(CONVERSATIONS), 100, 101):
            eventually(lambda n=conversation: read(worker, n) == {"right"}, 10, "what was acknowledged")
        assert (lower(daemon).counters["restarts"], daemon.status().pid) == (1, pid)
        assert daemon.faults() == []


@pytest.mark.slow
def test_kvd_starts_and_stops_while_its_disk_hangs(device: Device, disk: Throttle, tmp_path: Path) -> None:
    with node(device, tmp_path) as daemon:
        works(daemon)
        with PluginProcess(daemon.socket) as worker:
            assert worker.do("wait")
            worker.do("put", keys=span(PAGES))
            eventually(lambda: lower(daemon).pages == PAGES, 30, "it is written")
        for moment in ("runs", "starts"):
            disk.set(HANGS)
            if moment == "starts":
                daemon.kill()
                daemon.arena_path.unlink()
                daemon.start()
            with PluginProcess(daemon.socket) as worker:
                assert worker.do("wait")
                worker.do("put", keys=span(PAGES, 1))
                assert read(worker, 1) == {"right"}
            daemon.signal(signal.SIGTERM)
            assert daemon.process is not None
            assert daemon.process.wait(20) == 0, "it does not wait for its disk"
            disk.set(0)
            daemon.start()
            works(daemon)
        with PluginProcess(daemon.socket) as worker:
            assert worker.do("wait")
            eventually(lambda: read(worker, 0) == {"right"}, 10, "what was acknowledged")


@pytest.mark.slow
def test_a_disk_of_2_mb_per_s_brings_little_and_delays_nobody(device: Device, disk: Throttle, tmp_path: Path) -> None:
    with node(device, tmp_path) as daemon, PluginProcess(daemon.socket) as worker:
        works(daemon)
        assert worker.do("wait")
        fill(daemon, worker)
        disk.set(2_000_000)
        for conversation in range(12):  # what was looked up is promised for a while: more would not fit
            worker.do("put", keys=span(PAGES, 100 + conversation))
            assert worker.seconds < LOOKUP_S + 0.25
            assert read(worker, conversation) <= {"right", "miss"}
            assert read(worker, 100 + conversation) == {"right"}
        assert (lower(daemon).trouble, lower(daemon).counters["restarts"]) == ("", 0)
        assert daemon.status().counters["pages_promoted"] > 0
        assert daemon.faults() == []


@pytest.mark.slow
def test_large_pages_are_written_to_a_disk_of_2_mb_per_s_too(
    device: Device, disk: Throttle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that takes longer than kvd's patience would be lost, and written again, and lost again."""
    monkeypatch.setattr(kvdctl, "PAGE", MIB)
    with node(device, tmp_path) as daemon, RawWorker(daemon) as worker:
        works(daemon)
        disk.set(2_000_000)
        worker.put(24)
        eventually(lambda: lower(daemon).pages == 24, 60, "all is written")
        assert lower(daemon).counters["restarts"] == 0
