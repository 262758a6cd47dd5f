"""A catalog that is cut short under the tier's process: its memory map kills that process, and nobody else."""

import os
import shutil
from pathlib import Path

import psutil

from kvd import wire
from tests.harness import MIB, Daemon, PluginProcess, eventually, span
from tests.kvdctl import doctor, of

PAGES = 60


def nvme(daemon: Daemon) -> wire.TierStatus:
    return daemon.status().tiers[1]


def test_sigbus_costs_the_disks_pages_and_says_what_to_do(tmp_path: Path) -> None:
    tier = tmp_path / "nvme"
    settings = {"nvme__path": tier, "nvme__size_bytes": 64 * MIB, "nvme__segment_bytes": 8 * MIB}
    with (
        Daemon(tmp_path / "run", 8, 4, nvme__write_delay_s=0.05, **settings) as daemon,
        PluginProcess(daemon.socket) as worker,
    ):
        eventually(lambda: not nvme(daemon).trouble, 20, "the tier works")
        assert worker.do("wait")
        for conversation in range(12):  # more than RAM holds
            worker.do("put", keys=span(PAGES, conversation))
            eventually(lambda n=conversation: nvme(daemon).pages >= PAGES * (n + 1), 20, "all is written")
        pid = daemon.status().pid

        os.truncate(tier / "catalog" / "data.mdb", 2 * 4096)  # its head is whole, so it opens, and dies of the rest
        seen = set()
        for conversation in range(12):
            worker.do("exists", keys=span(PAGES, conversation))
            seen |= set(worker.do("take", keys=span(PAGES, conversation)))
            assert worker.seconds < 1.8
        assert seen <= {"right", "miss"}
        eventually(lambda: nvme(daemon).counters["restarts"] >= 2, 20, "it was started again, and died again")
        eventually(lambda: nvme(daemon).trouble == "its process ended: killed by SIGBUS", 10, "the reason")
        (red,) = of(doctor(daemon)[1], "nvme")
        assert red["level"] == "red"
        assert "SIGBUS" in red["message"]
        assert "remove the tier's folder" in red["remedy"]
        worker.do("put", keys=span(PAGES, 100))
        assert worker.do("take", keys=span(PAGES, 100)) == ["right"] * PAGES, "RAM does not care"
        assert worker.do("circuit") == "closed"
        assert daemon.faults() == []

        eventually(lambda: not psutil.Process(pid).children(), 20, "nobody is at the folder")
        shutil.rmtree(tier)
        eventually(lambda: not nvme(daemon).trouble, 60, "it works again by itself")
        eventually(lambda: nvme(daemon).pages >= PAGES, 20, "and has what RAM has")
        assert daemon.status().pid == pid, "kvd was never away"
        assert daemon.faults() == []
