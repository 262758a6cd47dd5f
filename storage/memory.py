"""The arena's memory itself: a sealed memfd parked with systemd, or a named file on tmpfs.

Both outlive kill -9 of the daemon. The memfd is sealed, so no peer that holds its descriptor can shrink it and
kill the daemon with SIGBUS; a tmpfs file cannot be sealed and is therefore readable by its owner only (0600).

Always true: a file is never resized, for who has it mapped would die of that; and one daemon at a time has it.
"""

import ctypes
import fcntl
import mmap
import os
import resource
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvd.errors import AlreadyRunning, SettingsError

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14
MADV_DONTDUMP = 16
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_LET_GO_S = 5.0  # workers whose kvd is gone let go of its memory
_libc = ctypes.CDLL(None, use_errno=True)  # a CDLL call releases the GIL, mmap.madvise does not


@dataclass(slots=True)
class ArenaMemory:
    """`path` is None for a memfd. `view` covers the whole file. A named file is ours as long as `lock_fd` is open."""

    fd: int
    map: mmap.mmap
    view: memoryview
    path: Path | None
    lock_fd: int = -1

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
        if self.lock_fd >= 0:  # last: until then nobody else looks at the file
            os.close(self.lock_fd)


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
    """The named file, made anew unless there is one of this size.

    Raises AlreadyRunning when another daemon has it, SettingsError when the file system is too small.
    """
    lock_fd, replaced = _own(path, size)
    # The lock is on a descriptor that nobody else gets. It belongs to what `open` returned: workers and tiers are
    # handed `fd`, and would keep a lock on that one when we are dead.
    fd = os.open(f"/proc/self/fd/{lock_fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)  # it has this size, or none
        until = time.monotonic() + (_LET_GO_S if replaced else 0.0)
        missing = size - os.fstat(fd).st_blocks * 512
        # Writing a hole that cannot be backed is SIGBUS: find out now.
        while missing > (room := _free_bytes(fd)):
            if time.monotonic() >= until:
                raise SettingsError(
                    f"{path.parent} has {room >> 20} MiB left, the arena needs {missing >> 20}",
                    "lower arena.size_bytes, enlarge that tmpfs, or stop who still has an old arena mapped",
                )
            time.sleep(0.1)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(fd)
        os.close(lock_fd)
        raise
    memory = _mapped(fd, size, path)
    memory.lock_fd = lock_fd
    return memory


def _own(path: Path, size: int) -> tuple[int, bool]:
    """A descriptor that keeps other daemons away from the file, which is empty or of this size, until it is closed;
    and whether one of another size was there."""
    replaced = False
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SettingsError(
                f"cannot open {path}: {error.strerror}", "set arena.path to a tmpfs you own"
            ) from error
        try:
            _lock(fd, path)
            if _is_named(fd, path):  # else its owner has just removed it
                if os.fstat(fd).st_size in (0, size):
                    return fd, replaced
                path.unlink()  # who has it mapped keeps it
                replaced = True
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise SettingsError(f"{path} is no file", "set arena.path to one on a tmpfs")
    if found.st_uid != os.getuid():
        raise SettingsError(f"{path} belongs to uid {found.st_uid}", "remove it or set arena.path")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise AlreadyRunning(f"another kvd uses {path}", "stop it, or choose another arena.path") from error


def _free_bytes(fd: int) -> int:
    room = os.fstatvfs(fd)
    return room.f_bavail * room.f_frsize


def _is_named(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


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
