"""Does kvd answer, and is it the same version as this tool?"""

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

from kvd import __version__, wire
from kvd.client import Link
from kvd.ctl.checks.finding import Finding
from kvd.ctl.terminal import span
from kvd.errors import DeadlineMissed, KvdError, Unavailable
from kvd.places import SOCKET

CHECK = "daemon"
_TIMEOUT_S = 1.2  # twice of this stays below a check's deadline
_USUAL = Path("/run/kvd") / SOCKET


@dataclass(slots=True)
class Seen:
    """What came of asking. A daemon may answer and yet refuse to talk: then there is no status."""

    status: wire.Status | None = None
    answered: bool = False


def reach(path: Path, seen: Seen) -> list[Finding]:
    """Ask for the status, and put it into `seen`."""
    started = time.perf_counter()
    try:
        link = Link(path, "tool", "kvdctl doctor", None, _TIMEOUT_S)
    except KvdError as error:
        seen.answered = not isinstance(error, Unavailable)
        return [_unreachable(path, error)]
    try:
        status = link.ask(wire.GetStatus(), wire.Status, _TIMEOUT_S)
    except KvdError as error:
        return [_unreachable(path, error)]
    finally:
        link.close()
    taken_us = round((time.perf_counter() - started) * 1e6)
    seen.status, seen.answered = status, True
    if status.version != __version__:
        remedy = "restart whichever is older, so that one version runs on this node"
        return [Finding(CHECK, "yellow", f"kvd is {status.version}, this tool {__version__}", remedy)]
    message = f"kvd {status.version} answers at {path} (pid {status.pid}, up {span(status.uptime_s)})"
    return [Finding(CHECK, "green", message, figures={"answer_us": taken_us})]


def none_here(path: Path) -> Finding | None:
    """For who came to look at a router: that this machine has no kvd, so that none is missed. None where it may."""
    if os.environ.get("KVD_RUN_DIR") or path.exists() or _USUAL.exists():
        return None
    return Finding(CHECK, "green", f"no kvd on this machine: there is nothing at {path}")


def _unreachable(path: Path, error: KvdError) -> Finding:
    return Finding(CHECK, "red", error.message, _remedy(path, error))


def _remedy(path: Path, error: KvdError) -> str:
    cause = error.__cause__
    number = cause.errno if isinstance(cause, OSError) else None
    if isinstance(error, DeadlineMissed):
        return "it is stopped or starved of CPU: look at `systemctl status kvd`, then `systemctl restart kvd`"
    if number in (errno.ENOENT, errno.ENOTDIR):
        if path != _USUAL and _USUAL.exists():
            return f"there is a socket at {_USUAL}: use --socket {_USUAL}, or set KVD_RUN_DIR={_USUAL.parent}"
        return "start it with `systemctl start kvd`, or say where it is with --socket or KVD_RUN_DIR"
    if number == errno.ECONNREFUSED:
        return "kvd died and left its socket: see why in `journalctl -u kvd`, then `systemctl restart kvd`"
    if number in (errno.EACCES, errno.EPERM):
        return f"{_permissions(path)}: become root or join that group"
    if isinstance(error, Unavailable):
        return "look at `journalctl -u kvd`: max_sessions may be attached, or few descriptors left (LimitNOFILE)"
    return error.hint or "install the same version of kvd on both sides"


def _permissions(path: Path) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return f"you may not enter {path.parent}"
    return f"the socket belongs to group {found.st_gid} with mode {found.st_mode & 0o777:o}"
