"""The arena as a named file: one daemon owns it, and what others have mapped stays theirs to read."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.harness import MIB, Daemon, PluginProcess, eventually, span

_HOLDER = """
import sys
from pathlib import Path
from kvd.client import Link
link = Link(Path(sys.argv[1]), "tool", "holder", None, 5.0)
before = bytes(link.arena)
print("mapped", flush=True)
sys.stdin.readline()
print(bytes(link.arena) == before, flush=True)
"""


@contextmanager
def holder(daemon: Daemon) -> Iterator["subprocess.Popen[str]"]:
    """Has the arena mapped, whatever becomes of the daemon, and reads all of it again when it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, daemon.socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("mib", [32, 96])
def test_another_size_after_a_crash_takes_no_memory_from_those_who_have_it_mapped(daemon: Daemon, mib: int) -> None:
    with holder(daemon) as process:
        daemon.kill()
        daemon.env["KVD_ARENA__SIZE_BYTES"] = str(mib * MIB)
        daemon.start()
        assert process.communicate("\n", 10)[0] == "True\n"
        assert process.returncode == 0, "SIGBUS, where the file was cut short"
    assert daemon.status().tiers[0].bytes_total == mib * MIB
    with PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(3))
        assert worker.do("take", keys=span(3)) == ["right"] * 3
    assert daemon.faults() == []


def test_a_worker_lets_go_of_the_arena_of_a_kvd_that_is_gone(tmp_path: Path) -> None:
    """Else there would be no room for one of another size."""
    arena = tmp_path / "arena"
    with Daemon(tmp_path / "run", arena__path=arena) as daemon, PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(9))
        maps = Path(f"/proc/{worker.process.pid}/maps")
        assert str(arena) in maps.read_text()
        daemon.kill()
        eventually(lambda: str(arena) not in maps.read_text(), 10, "it is not mapped any more")


def test_a_second_kvd_with_the_same_arena_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    arena = tmp_path / "arena"
    with Daemon(tmp_path / "run", arena__path=arena) as first, PluginProcess(first.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(9))
        second = Daemon(tmp_path / "other", arena__path=arena).start(wait=False)
        assert second.process is not None
        try:
            assert second.process.wait(10) == 1
        finally:
            second.process.kill()
        assert f"another kvd uses {arena}" in second.log.read_text()
        assert "arena.path" in second.log.read_text()
        assert worker.do("take", keys=span(9)) == ["right"] * 9
        assert first.faults() == []
    assert not arena.exists()
    with second:
        assert second.status().tiers[0].pages == 0


@pytest.mark.parametrize("who", ["worker", "tier"])
def test_who_was_handed_the_arena_does_not_keep_it_from_the_next_daemon(tmp_path: Path, who: str) -> None:
    """A stopped worker, and the process of a tier that hangs, still have the descriptor when kvd has died."""
    daemon = Daemon(tmp_path / "run", nvme__path=tmp_path / "tier", nvme__size_bytes=256 * MIB)
    with daemon, PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(9))
        assert daemon.process is not None
        (tier,) = psutil.Process(daemon.process.pid).children()
        with stopped(worker.process.pid if who == "worker" else tier.pid):
            daemon.kill()
            daemon.start()
            assert daemon.status().warm_pages == 9
        # It may not have noticed yet that the kvd which it knew is gone.
        eventually(lambda: worker.do("take", keys=span(9)) == ["right"] * 9, 10, "the pages are there")
