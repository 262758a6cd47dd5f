"""The arena's memory itself: a sealed memfd parked with systemd, or a named file on tmpfs.

Both outlive kill -9 of the daemon. The memfd is sealed, so no peer that holds its descriptor can shrink it and
kill the daemon with SIGBUS; a tmpfs file cannot be sealed and is therefore readable by its owner only (0600).
"""

import ctypes
import fcntl
import mmap
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvd.errors import SettingsError

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14
MADV_DONTDUMP = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_libc = ctypes.CDLL(None, use_errno=True)  # a CDLL call releases the GIL, mmap.madvise does not


@dataclass(slots=True)
class ArenaMemory:
    """`path` is None for a memfd. `view` covers the whole file."""

    fd: int
    map: mmap.mmap
    view: memoryview
    path: Path | None

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "memfd"

    def close(self, keep: bool) -> None:
        """Unmap; unless `keep`, remove the file. Idempotent."""
        if self.fd < 0:
            return
        if self.path is not None and not keep:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)
        self.fd = -1


def create_memfd(size: int) -> ArenaMemory:
    fd = os.memfd_create("kvd-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return _mapped(fd, size, None)


def adopt(fd: int, size: int) -> ArenaMemory | None:
    """Memory that the service manager kept; None when its size is not what the settings say."""
    if os.fstat(fd).st_size != size:
        os.close(fd)
        return None
    return _mapped(fd, size, None)


def open_file(path: Path, size: int) -> ArenaMemory:
    """The named file, made or resized where needed. Raises SettingsError when the file system is too small."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SettingsError(f"cannot open {path}: {error.strerror}", "set arena.path to a tmpfs you own") from error
    stat = os.fstat(fd)
    if stat.st_uid != os.getuid():
        os.close(fd)
        raise SettingsError(f"{path} belongs to uid {stat.st_uid}", "remove it or set arena.path")
    try:
        if stat.st_size != size:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
        room = os.fstatvfs(fd)
        missing = size - os.fstat(fd).st_blocks * 512
        if missing > room.f_bavail * room.f_frsize:
            # Writing a hole that cannot be backed is SIGBUS: find out now.
            raise SettingsError(
                f"{path.parent} has {room.f_bavail * room.f_frsize >> 20} MiB left, the arena needs {missing >> 20}",
                "lower arena.size_bytes, or enlarge that tmpfs",
            )
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return _mapped(fd, size, path)


def _mapped(fd: int, size: int, path: Path | None) -> ArenaMemory:
    area = mmap.mmap(fd, size)
    area.madvise(MADV_DONTDUMP)  # pages are users' prompts: keep them out of core dumps
    return ArenaMemory(fd, area, memoryview(area), path)


def address(area: mmap.mmap) -> int:
    """Where a writable mapping begins. Holds no export on it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def populate(area: mmap.mmap, step: int, write: bool, goes_on: Callable[[int], bool]) -> int:
    """Fault in a mapping step by step, without the GIL, while `goes_on(bytes done)`; the bytes done.

    Stops early, without an error, on kernels that cannot.
    """
    start, size, done = address(area), len(area), 0
    advice = MADV_POPULATE_WRITE if write else MADV_POPULATE_READ
    while done < size and goes_on(done):
        part = min(step, size - done)
        if _libc.madvise(ctypes.c_void_p(start + done), ctypes.c_size_t(part), advice) != 0:
            break
        done += part
    return done


def lock(area: mmap.mmap) -> None:
    """mlock the whole mapping. Raises SettingsError below the limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < len(area):
        raise SettingsError(
            f"memlock limit is {soft} bytes, the arena has {len(area)}",
            "set LimitMEMLOCK=infinity in the unit, or arena.lock = false",
        )
    if _libc.mlock(ctypes.c_void_p(address(area)), ctypes.c_size_t(len(area))) != 0:
        raise SettingsError(f"mlock failed: {os.strerror(ctypes.get_errno())}", "set arena.lock = false")
