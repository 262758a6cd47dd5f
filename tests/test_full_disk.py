"""A real kvd whose lower tier lies on a disk that others have filled: it says so, serves, and uses the room again."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import wire
from tests.harness import MIB, Daemon, PluginProcess, eventually, span
from tests.kvdctl import doctor, of
from tests.loop_device import Device, loop_device

PAGES = 60


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with loop_device(tmp_path) as device:
        yield device


def occupy(device: Device, left_bytes: int) -> Path:
    """A file of somebody else's."""
    path = device.mount_point / "somebody's"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(device.mount_point).free - left_bytes)
    return path


def lower(daemon: Daemon) -> wire.TierStatus:
    return daemon.status().tiers[1]


def doctors_line(daemon: Daemon, kind: str) -> tuple[str, str]:
    (finding,) = of(doctor(daemon)[1], kind)
    return finding["level"], finding["remedy"]


def put(daemon: Daemon, worker: PluginProcess, conversations: range) -> None:
    for conversation in conversations:
        worker.do("put", keys=span(PAGES, conversation))
        eventually(lambda: lower(daemon).trouble or not lower(daemon).counters["waiting_to_be_written"], 20)


def read(worker: PluginProcess, conversation: int) -> set[str]:
    worker.do("exists", keys=span(PAGES, conversation))
    return set(worker.do("take", keys=span(PAGES, conversation)))


def test_the_nvme_tier_lives_with_the_room_that_it_has(device: Device, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    settings = {"nvme__path": device.mount_point / "tier", "nvme__size_bytes": 1024 * MIB}
    settings |= {"nvme__segment_bytes": 8 * MIB, "nvme__write_delay_s": 0.05}
    with Daemon(tmp_path / "run", 16, 4, **settings) as daemon, PluginProcess(daemon.socket) as worker:
        eventually(lambda: not lower(daemon).trouble, 20, "the tier works")
        assert worker.do("wait")
        put(daemon, worker, range(10))
        occupy(device, 3 * MIB)
        put(daemon, worker, range(10, 40))
        assert lower(daemon).evicted > 0
        assert {answer for n in range(40) for answer in read(worker, n)} == {"right", "miss"}
        assert read(worker, 39) == {"right"}
        assert (lower(daemon).trouble, lower(daemon).counters["restarts"]) == ("", 0)
        level, remedy = doctors_line(daemon, "nvme")
        assert (level, "make room" in remedy) == ("yellow", True)
        assert daemon.faults() == []


@pytest.mark.slow  # it tries again after half a minute
def test_the_shared_tier_reads_on_and_writes_again_when_there_is_room(device: Device, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    settings = {"shared__uri": device.mount_point / "tier", "shared__node": "n", "shared__write_delay_s": 0.05}
    with Daemon(tmp_path / "run", 16, 4, **settings) as daemon, PluginProcess(daemon.socket) as worker:
        eventually(lambda: not lower(daemon).trouble, 20, "the tier works")
        assert worker.do("wait")
        put(daemon, worker, range(40))
        eventually(lambda: lower(daemon).pages == 40 * PAGES, 10, "more than RAM holds is there")
        occupied = occupy(device, MIB)
        for conversation in range(40, 46):
            worker.do("put", keys=span(PAGES, conversation))
            assert read(worker, conversation) == {"right"}, "RAM does not care"
        eventually(lambda: lower(daemon).counters.get("disk_full"), 20, "that it is full is known")
        level, remedy = doctors_line(daemon, "shared")
        assert (level, "make room" in remedy) == ("yellow", True)
        assert read(worker, 0) == {"right"}, "from the full disk"
        assert (lower(daemon).trouble, lower(daemon).counters["restarts"]) == ("", 0)

        occupied.unlink()

        def written() -> bool:
            worker.do("put", keys=span(PAGES, 100))
            return lower(daemon).pages > 40 * PAGES and "disk_full" not in lower(daemon).counters

        eventually(written, 60, "it writes again by itself")
        assert daemon.faults() == []
