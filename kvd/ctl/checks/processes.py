"""SGLang processes that were launched with the plugin, and of which nothing is attached.

A process belongs to a worker when it, or a descendant, is attached: SGLang loads the plugin in its schedulers, the
flags are on the server that started them. One whose settings name another socket is asked for there.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from kvd import wire
from kvd.client import Link
from kvd.ctl.checks.finding import Finding
from kvd.ctl.checks.launched import plugin_settings
from kvd.ctl.terminal import printable, span
from kvd.errors import KvdError
from kvd.places import SOCKET, run_dir

CHECK = "sglang"
_ELSEWHERE_TIMEOUT_S = 0.4
_MOST_SOCKETS = 3


def processes(path: Path, status: wire.Status) -> list[Finding]:
    """A red finding for each server that should be attached and is not."""
    path = path.resolve()
    found = {process.pid: process for process in psutil.process_iter(["pid", "ppid", "cmdline", "create_time"])}
    parents = {pid: process.info["ppid"] or 0 for pid, process in found.items()}
    served = _lineage((worker.pid for worker in status.workers), parents)
    read = {pid: plugin_settings(process.info["cmdline"] or [], process.cwd) for pid, process in found.items()}
    marked = {pid: settings for pid, settings in read.items() if settings is not None}
    tops = sorted(pid for pid in marked if not (_lineage([parents[pid]], parents) & marked.keys()))
    lost = [pid for pid in tops if pid not in served]
    sockets = {pid: _socket_of(found[pid], marked[pid]) for pid in lost}
    elsewhere: set[int] = set()
    for other in sorted({s for s in sockets.values() if s not in (None, path)}, key=str)[:_MOST_SOCKETS]:
        elsewhere |= _lineage(_attached_at(other), parents) if other is not None else set()
    findings = [_lost(found[pid], sockets[pid], path) for pid in lost if pid not in elsewhere]
    if findings:
        return findings
    if not tops:
        return [Finding(CHECK, "green", "no SGLang process here was launched with the plugin")]
    others = f", {len(lost)} of them to another kvd" if lost else ""
    return [Finding(CHECK, "green", f"all {len(tops)} SGLang servers launched with the plugin are attached{others}")]


def _lineage(pids: Iterable[int], parents: dict[int, int]) -> set[int]:
    """The processes and all their ancestors."""
    family: set[int] = set()
    for pid in pids:
        while pid > 0 and pid not in family:
            family.add(pid)
            pid = parents.get(pid, 0)
    return family


def _socket_of(process: psutil.Process, settings: dict[str, Any]) -> Path | None:
    """Where its plugin looks for kvd, as far as can be told."""
    try:
        if given := settings.get("socket"):
            named = Path(str(given))
            return (named if named.is_absolute() else Path(process.cwd()) / named).resolve()
        return (run_dir(process.environ(), process.uids().effective) / SOCKET).resolve()
    except (psutil.Error, OSError, ValueError):
        return None  # somebody else's process, or no path at all


def _attached_at(path: Path) -> list[int]:
    """Pids of the workers attached to the kvd at another socket."""
    try:
        link = Link(path, "tool", "kvdctl doctor", None, _ELSEWHERE_TIMEOUT_S)
        try:
            status = link.ask(wire.GetStatus(), wire.Status, _ELSEWHERE_TIMEOUT_S)
        finally:
            link.close()
    except KvdError:
        return []
    return [worker.pid for worker in status.workers]


def _lost(process: psutil.Process, looks_at: Path | None, path: Path) -> Finding:
    age = span(time.time() - process.info["create_time"])
    command = printable(" ".join(process.info["cmdline"]))[:60]
    message = f"pid {process.pid} ({command}...) was launched with the plugin {age} ago and is not attached"
    log = "see 'kvd' lines in its log; while it still loads its model, wait"
    if looks_at is None:
        remedy = f"it must find {path}: set KVD_RUN_DIR={path.parent} for it; {log}"
    elif looks_at != path:
        remedy = f"it looks for kvd at {looks_at}: set KVD_RUN_DIR={path.parent} for it and restart it; {log}"
    else:
        remedy = f"may its user use the socket ({_access(path)})? {log}"
    return Finding(CHECK, "red", message, remedy)


def _access(path: Path) -> str:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    return f"mode {found.st_mode & 0o777:o}, user {found.st_uid}, group {found.st_gid}"
