"""Checks around every test: nothing it started may be left behind."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvd.router.knowledge import Manner
from tests.harness import ARENAS, Daemon, PluginProcess, eventually
from tests.router_harness import MockWorker
from tests.router_world import Table, open_manner

collect_ignore_glob: list[str] = []


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
    return found


def _children() -> set[int]:
    """Descendants that live, from the kernel's own lists: to look at all processes takes 10 ms, twice a test."""
    found: set[int] = set()
    parents = [os.getpid()]
    while parents:
        for path in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with suppress(OSError):
                born = [pid for pid in map(int, path.read_text().split()) if _lives(pid)]
                found.update(born)
                parents += born
    return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _shared_memory() -> set[str]:
    return ARENAS & set(os.listdir("/dev/shm"))


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Processes, threads, descriptors, sockets and shared memory are what they were before the test."""
    threads, fds = set(threading.enumerate()), _descriptors()
    children, shm = _children(), _shared_memory()
    yield
    eventually(lambda: not (_children() - children), 5, "no process is left")
    left = eventually_threads(threads)
    assert not left, f"threads left: {left}"
    assert not _shared_memory() - shm, "shared memory left in /dev/shm"
    if _new(fds):
        gc.collect()
    assert not _new(fds), f"descriptors left: {_new(fds)}"


def _new(before: dict[int, str]) -> dict[int, str]:
    """Descriptors that were not there, but for pipes and devices."""
    new = {fd: what for fd, what in _descriptors().items() if fd not in before}
    return {fd: what for fd, what in new.items() if not what.startswith(("/dev/", "pipe:")) or "shm" in what}


def eventually_threads(before: set[threading.Thread]) -> list[str]:
    """Threads that do not end by themselves within a moment."""
    alive: list[threading.Thread] = []

    def gone() -> bool:
        alive[:] = [t for t in threading.enumerate() if t not in before and not t.name.startswith("pytest")]
        return not alive

    try:
        eventually(gone, 3)
    except AssertionError:
        return [t.name for t in alive]
    return []


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A running kvd with a small arena."""
    with Daemon(tmp_path / "run") as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One kvd for all tests of a file that change nothing in it."""
    with Daemon(tmp_path_factory.mktemp("shared") / "run") as running:
        yield running


@pytest.fixture
def worker(daemon: Daemon) -> Iterator[PluginProcess]:
    """A worker with the plugin, attached to the test's kvd."""
    with PluginProcess(daemon.socket) as process:
        assert process.do("wait")
        yield process


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Daemon]:
    """One of two sites."""
    with Daemon(tmp_path / "here") as running:
        yield running


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Daemon]:
    """The other."""
    with Daemon(tmp_path / "there") as running:
        yield running


@pytest.fixture(scope="module")
def manner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manner]:
    """How workers of one small model make prompts and name blocks."""
    with open_manner(tmp_path_factory.mktemp("m")) as found:
        yield found


@pytest.fixture
def table(manner: Manner) -> Table:
    """What a router knows of two workers of that model."""
    return Table(["w0", "w1"], manner)


@pytest.fixture(scope="module")
def mock() -> Iterator[MockWorker]:
    """A worker that generates nothing but counts, for all tests of a file."""
    with MockWorker() as running:
        yield running
