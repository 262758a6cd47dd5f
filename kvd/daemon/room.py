"""What the daemon owns in memory: the arena, the index over it, and the node that rules both.

`open_room` finds the arena of a previous daemon (the service manager's descriptor store, else the named file) and
takes its pages over; memory that is not ours, or of another format, is started cold and said so in the log.
"""

import fcntl
import logging
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvd import systemd
from kvd.daemon.node import Node
from kvd.daemon.sessions import Sessions
from kvd.errors import AlreadyRunning, SettingsError
from kvd.index import IndexWriter, entries_for, index_bytes
from kvd.places import arena_path
from kvd.settings import DaemonSettings
from kvd.storage import memory
from kvd.storage.arena import SUPERBLOCK_BYTES, Arena
from kvd.storage.memory import ArenaMemory
from kvd.storage.quota import Quotas, Share

log = logging.getLogger("kvd.room")

FD_NAME = "kvd-arena"
# Size the index. Smaller pages fill it before the tiers are full: then pages in RAM come first.
_TYPICAL_PAGE_BYTES, _TYPICAL_PAGE_BELOW_BYTES = 64 << 10, 256 << 10
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@dataclass(slots=True)
class Room:
    node: Node
    memory: ArenaMemory
    index_fd: int
    index_bytes: int
    epoch: int
    parked: bool  # with the service manager


@contextmanager
def open_room(settings: DaemonSettings, inherited: dict[str, int]) -> Iterator[Room]:
    """The arena, warm where possible. Raises SettingsError or AlreadyRunning."""
    lock_fd = _lock(settings.run_dir)
    size = SUPERBLOCK_BYTES + settings.arena.extents * settings.arena.extent_bytes
    arena_memory, parked = _arena_memory(settings, inherited, size)
    index_fd = -1
    keep = True  # whatever goes wrong from here on, the pages stay for the next start
    try:
        if settings.arena.lock:
            memory.lock(arena_memory.map)
        pages = size // _TYPICAL_PAGE_BYTES
        if settings.nvme.path is not None:
            pages += settings.nvme.size_bytes // _TYPICAL_PAGE_BELOW_BYTES
        if settings.shared.uri is not None:
            pages += settings.shared.quota_bytes // _TYPICAL_PAGE_BELOW_BYTES
        entries = entries_for(min(pages, 1 << 24))
        index_fd = os.memfd_create("kvd-index", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(index_fd, index_bytes(entries))
        fcntl.fcntl(index_fd, fcntl.F_ADD_SEALS, _SEALS)
        index_map = mmap.mmap(index_fd, index_bytes(entries), mmap.MAP_SHARED | mmap.MAP_POPULATE)
        epoch = secrets.randbits(63)
        arena = Arena(arena_memory.view, settings.arena.extent_bytes)
        index = IndexWriter(memoryview(index_map), entries, epoch)
        shares = {name: Share(s.ram_reserve_bytes, s.ram_burst_bytes) for name, s in settings.tenants.items()}
        node = Node(arena, index, Sessions(), Quotas(shares), settings.arena.ttl_s, settings.pins_path)
        started = time.monotonic()
        if reason := arena.recognise():
            if reason != "new":
                log.warning("starting cold: %s", reason)
            arena.format()
        else:
            node.recover(arena.reopen(), started)
            log.info("took over %d pages in %.2f s", node.warm_pages, time.monotonic() - started)
        yield Room(node, arena_memory, index_fd, index_bytes(entries), epoch, parked)
        keep = settings.arena.keep_on_stop
    finally:
        arena_memory.close(keep)
        for fd in (index_fd, lock_fd):
            if fd >= 0:
                os.close(fd)


def _lock(run_dir: Path) -> int:
    try:
        run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(run_dir / "kvd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(
            f"cannot use {run_dir}: {error.strerror}", "set KVD_RUN_DIR to a folder you own"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise AlreadyRunning(f"another kvd runs in {run_dir}", "stop it, or choose another run_dir") from error
    return fd


def _arena_memory(settings: DaemonSettings, inherited: dict[str, int], size: int) -> tuple[ArenaMemory, bool]:
    """The memory, and whether the service manager keeps it."""
    if FD_NAME in inherited:
        adopted = memory.adopt(inherited[FD_NAME], size)
        if adopted is not None:
            return adopted, True
        log.warning("starting cold: the parked arena has another size")
        systemd.forget(FD_NAME)
    if os.environ.get("NOTIFY_SOCKET") and settings.arena.path is None:
        fresh = memory.create_memfd(size)
        return fresh, systemd.store(FD_NAME, fresh.fd)
    return memory.open_file(settings.arena.path or arena_path(settings.run_dir, os.getuid()), size), False
