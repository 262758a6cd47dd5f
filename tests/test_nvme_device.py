"""A real kvd whose NVMe tier lies on a block device that fails: an ext4 on a loop device, cut short under its feet.

Beyond the cut the kernel answers reads and writes with EIO. What LMDB maps of it kills the tier's process (SIGBUS),
what is opened or read there is refused; either way kvd stays up, says so, and serves from RAM.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import wire
from kvd.pages import chain
from tests.harness import MIB, Daemon, PluginProcess, eventually
from tests.kvdctl import doctor, of
from tests.loop_device import Device, loop_device

PAGES = 60


def span(conversation: int) -> list[str]:
    return [key.hex() for key in chain([conversation, *range(4 * PAGES - 1)], 4)]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with loop_device(tmp_path) as device:
        yield device


def nvme(daemon: Daemon) -> wire.TierStatus:
    return daemon.status().tiers[1]


def read(worker: PluginProcess, conversation: int) -> list[str]:
    """As SGLang does: a lookup, which has pages fetched, then the read."""
    worker.do("exists", keys=span(conversation))
    answers: list[str] = worker.do("take", keys=span(conversation))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True], ids=["the-same-comes-back", "a-new-one-comes"])
def test_a_device_that_fails_costs_what_is_on_it_and_no_more(device: Device, tmp_path: Path, replaced: bool) -> None:
    tier = device.mount_point / "tier"
    (tmp_path / "run").mkdir()
    tier_settings = {
        "nvme__path": tier, "nvme__mount_point": device.mount_point, "nvme__size_bytes": 256 * MIB,
        "nvme__segment_bytes": 8 * MIB,
    }  # fmt: skip
    with (
        Daemon(tmp_path / "run", 8, 4, nvme__write_delay_s=0.05, **tier_settings) as daemon,
        PluginProcess(daemon.socket) as worker,
    ):
        eventually(lambda: not nvme(daemon).trouble, 30, "the tier works")
        assert worker.do("wait")
        for conversation in range(20):  # more than RAM holds
            worker.do("put", keys=span(conversation))
            eventually(lambda n=conversation: nvme(daemon).pages >= PAGES * (n + 1), 30, "all is written")
        assert read(worker, 0) == ["right"] * PAGES, "from the device"
        pid = daemon.status().pid

        device.cut(MIB)
        device.forget_cached(tier / "catalog" / "data.mdb")
        seen = set()
        for conversation in range(20):
            seen |= set(read(worker, conversation))
        assert seen == {"right", "miss"}, "what only the device has is a miss"
        eventually(lambda: nvme(daemon).trouble not in ("", "opening"), 60, "its trouble is known")
        for conversation in range(100, 104):
            worker.do("put", keys=span(conversation))
            assert read(worker, conversation) == ["right"] * PAGES, "RAM does not care"
        eventually(lambda: of(doctor(daemon)[1], "nvme")[0]["level"] == "red", 30, "the doctor says so")
        assert daemon.faults() == []

        eventually(device.unmount, 60, "nobody is at the device")
        eventually(lambda: "nothing is mounted" in nvme(daemon).trouble, 60, "that nothing is mounted is known")
        assert list(device.mount_point.iterdir()) == [], "nothing is written beneath the mount point"
        device.cut(0)
        if replaced:
            device.format()
        device.mount()
        eventually(lambda: not nvme(daemon).trouble, 90, "the tier works again")
        eventually(lambda: nvme(daemon).counters["waiting_to_be_written"] == 0, 30, "what RAM has is written")
        assert daemon.status().pid == pid, "kvd was never away"
        assert of(doctor(daemon)[1], "nvme")[0]["level"] == "green"
        answers = {c: read(worker, c) for c in (103, *range(20), *range(100, 103))}
        assert {answer for answer_list in answers.values() for answer in answer_list} <= {"right", "miss"}
        for conversation in (103, *([] if replaced else range(20))):
            # A first lookup may be shortened to what is worth fetching, but nothing puts these pages again.
            eventually(lambda n=conversation: set(read(worker, n)) == {"right"}, 10, "what was acknowledged")
        assert daemon.faults() == []
        assert daemon.status().pid == pid
