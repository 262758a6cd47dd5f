"""The end of a server: no process of its session, none of its files in /tmp and /dev/shm.

Also a program, `session.py PID FOLDER`: the guard. It waits for the end of its standard input, a pipe from who started
the server; when that closes without a word, it ends the session and removes what it had. Stdlib only.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import IO

SHARED_MEMORY = Path("/dev/shm")
SHARED_BY_SGLANG = ("sglang_", "sgl_shm_", "torch_", "psm_", "sem.mp-")  # names it and its libraries give


def bury(session: int, scratch: Path, shared_memory: set[Path]) -> None:
    """SIGKILL to all of a session until none is left, then remove what it had; fine when all is gone."""
    leftovers = shared_memory | shared_memory_of(session)
    while members := session_members(session):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for path in leftovers:
        path.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


def session_members(session: int) -> list[int]:
    """Its live processes (a dead one that nobody waited for yet is not one)."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session_of(pid) == session]


def session_of(pid: int) -> int | None:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, _parent, _group, session = after_name[:4]
    return None if state in "ZX" else int(session)


def shared_memory_of(session: int) -> set[Path]:
    """Files in /dev/shm its processes have mapped, by inode: a semaphore is mapped under another name."""
    inodes: set[int] = set()
    for pid in session_members(session):
        with contextlib.suppress(OSError):
            maps = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
            inodes |= {int(line[4]) for line in maps if line[5:] and line[5].startswith(f"{SHARED_MEMORY}/")}
    files = (path for path in SHARED_MEMORY.iterdir() if path.name.startswith(SHARED_BY_SGLANG))
    return {path for path in files if inode_of(path) in inodes}


def inode_of(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def guard(session: int, scratch: Path, lifeline: IO[bytes]) -> None:
    """Wait until the process that started the server has ended it, or is gone: then end it here."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    if not lifeline.read():
        bury(session, scratch, set())


if __name__ == "__main__":
    guard(int(sys.argv[1]), Path(sys.argv[2]), sys.stdin.buffer)
