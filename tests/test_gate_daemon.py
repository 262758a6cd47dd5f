"""A real kvd on a slow disk: what is not worth loading is not given out, what is worth it is; nobody waits for long.

The worker's cost of computing is what its plugin observes: here a lookup that misses, a pause, and a put.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import wire
from tests.harness import MIB, Daemon, PluginProcess, eventually, reattached, span
from tests.slow_disk import MISSING, SlowDisk

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

PAGE_BYTES = 16 << 10  # of the tests' worker; 4 tokens


@pytest.fixture
def disk(tmp_path: Path) -> SlowDisk:
    return SlowDisk(tmp_path)


@pytest.fixture
def daemon(tmp_path: Path, disk: SlowDisk) -> Iterator[Daemon]:
    daemon = Daemon(
        tmp_path / "run", 16, 4, nvme__path=tmp_path / "nvme", nvme__size_bytes=256 * MIB,
        nvme__segment_bytes=8 * MIB, nvme__write_delay_s=0.05,
    )  # fmt: skip
    daemon.env |= disk.environment
    with daemon:
        yield daemon


def nvme(daemon: Daemon) -> wire.TierStatus:
    return daemon.status().tiers[1]


def computes(daemon: Daemon, worker: PluginProcess, tokens_per_s: float) -> None:
    """The worker is seen to compute that fast."""
    for n in range(3):
        keys = span(60, 1000 + n)
        assert worker.do("exists", keys=keys) == 0
        time.sleep(4 * len(keys) / tokens_per_s)
        worker.do("put", keys=keys)
    known = eventually(lambda: daemon.status().workers[0].counters.get("prefill_tokens_per_s"), 5)
    assert known == pytest.approx(tokens_per_s, rel=0.3)


def reboot(daemon: Daemon, worker: PluginProcess, pages: int) -> None:
    """When all is on disk, kvd and its memory go; it measures its disk when it comes back."""
    eventually(lambda: nvme(daemon).pages >= pages, 20, f"{pages} pages are written")
    daemon.kill()
    daemon.arena_path.unlink()
    daemon.start()
    reattached(worker)
    eventually(lambda: not nvme(daemon).trouble, 20)
    eventually(lambda: daemon.status().workers[0].counters.get("prefill_tokens_per_s"), 5, "the worker has reported")


def found(worker: PluginProcess) -> int:
    """Of the prefix. A lookup that a starved kvd answers too late is a miss, and says nothing about the gate."""
    return eventually(lambda: int(worker.do("exists", keys=span(100))), 10, "something is found")


def test_a_disk_slower_than_the_worker_is_not_asked(daemon: Daemon, worker: PluginProcess, disk: SlowDisk) -> None:
    worker.do("put", keys=span(100))
    computes(daemon, worker, 1000)  # 250 pages a second
    disk.set(100 * PAGE_BYTES)
    reboot(daemon, worker, 280)
    assert nvme(daemon).counters["loads_bytes_per_s"] < 110 * PAGE_BYTES
    assert worker.do("exists", keys=span(100)) == 0
    assert daemon.status().counters["gate_refused_pages"] == 100
    assert daemon.status().counters.get("pages_promoted", 0) == 0
    assert daemon.faults() == []


def test_a_disk_faster_than_the_worker_is_asked(daemon: Daemon, worker: PluginProcess, disk: SlowDisk) -> None:
    worker.do("put", keys=span(100))
    computes(daemon, worker, 1000)
    disk.set(1000 * PAGE_BYTES)
    reboot(daemon, worker, 280)
    assert found(worker) == 100
    assert worker.do("take", keys=span(100)) == ["right"] * 100
    assert "gate_refused_pages" not in daemon.status().counters


def test_of_a_prefix_that_takes_too_long_the_beginning_is_loaded(
    daemon: Daemon, worker: PluginProcess, disk: SlowDisk
) -> None:
    worker.do("put", keys=span(100))
    computes(daemon, worker, 100)  # 25 pages a second
    disk.set(50 * PAGE_BYTES)
    reboot(daemon, worker, 280)
    given = found(worker)
    assert 60 <= given < 100, "what comes in the 1.7 s that a reader waits"
    answers = worker.do("take", keys=span(100)[:given])
    assert worker.seconds < 2.0
    assert answers[: given // 2] == ["right"] * (given // 2)


def test_a_disk_that_turns_slow_costs_a_moment_once(daemon: Daemon, worker: PluginProcess, disk: SlowDisk) -> None:
    worker.do("put", keys=span(100))
    computes(daemon, worker, 1000)
    reboot(daemon, worker, 280)
    disk.set(20 * PAGE_BYTES)
    assert found(worker) == 100, "it does not know yet"
    assert worker.do("take", keys=span(100)).count("right") < 50
    assert worker.seconds < 1.5, "given up before the 1.7 s that a reader waits"


def test_a_disk_that_recovers_is_found_out(daemon: Daemon, worker: PluginProcess, disk: SlowDisk) -> None:
    worker.do("put", keys=span(100))
    computes(daemon, worker, 1000)
    disk.set(100 * PAGE_BYTES)
    reboot(daemon, worker, 280)
    assert worker.do("exists", keys=span(100)) == 0
    disk.set(0)
    eventually(lambda: worker.do("exists", keys=span(100)) == 100, 60)
