"""The processes of one router: they share a port, and when one of them ends by itself all do.

A port has one router. Only its own processes join it there, and one that is to replace it (`kvd-router --take-over`):
any other would take part of its clients without its keys, in silence.
"""

import ctypes
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from kvd import systemd
from kvd.errors import KvdError, SettingsError
from kvd.router.settings import RouterSettings

log = logging.getLogger("kvd.router")
BACKLOG: Final = 2048
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_STOPS: Final = (signal.SIGTERM, signal.SIGINT)

Run = Callable[[RouterSettings, socket.socket, int | None], None]  # with what to write to once clients are served


def listener(host: str, port: int, beside: bool = False) -> socket.socket:
    """A socket beside which others may listen if they ask to. `beside`: others may listen there already. Raises
    SettingsError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of one that ended are no hindrance
        if beside:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        # Only now: a socket that had this before would join those of any other router of this user.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        sock.close()
        remedy = "choose another listen.host or listen.port"
        if error.errno == errno.EADDRINUSE:
            remedy = (
                "another kvd-router or another program is there: stop it, or choose another listen.port (--port), "
                "or replace a kvd-router without a gap: --take-over"
            )
        raise SettingsError(f"cannot listen at {host}:{port}: {error.strerror or error}", remedy) from error
    return sock


def watch(settings: RouterSettings, sock: socket.socket, run: Run) -> int:
    """Run all processes and wait for them; the first of them that ends by itself ends all. Their exit status."""
    port = sock.getsockname()[1]
    heard, ready = os.pipe()
    children: set[int] = set()
    stopping = False
    watcher = os.getpid()
    for number in range(settings.listen.processes):
        if (child := os.fork()) == 0:
            os.close(heard)
            own = sock if number == 0 else listener(settings.listen.host, port, beside=True)
            _be_child(watcher, settings, own, ready, run)
        children.add(child)
    sock.close()
    os.close(ready)

    def forward(number: int, _: Any) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            with suppress(ProcessLookupError):  # it has ended, and is just being noticed
                os.kill(child, number)

    for number in _STOPS:
        signal.signal(number, forward)
    if _all_ready(heard, len(children)):
        systemd.notify(f"READY=1\nSTATUS={len(children)} processes")
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        if not (stopping and os.WIFSIGNALED(status) and os.WTERMSIG(status) in _STOPS):  # it had not yet begun
            failed |= status
        if not stopping:
            log.error("process %d ended by itself: so do the others", child)
            failed = 1
            forward(signal.SIGTERM, None)
    for number in _STOPS:  # one more would make a clean stop look like none
        signal.signal(number, signal.SIG_IGN)
    return 1 if failed else 0


def _be_child(parent: int, settings: RouterSettings, sock: socket.socket, ready: int, run: Run) -> None:
    """Never returns."""
    status = 1
    try:
        _end_with(parent)
        run(settings, sock, ready)
        status = 0
    except BaseException:
        log.exception("this process ends")
    finally:
        os._exit(status)


def _end_with(parent: int) -> None:
    """Else who watches over them could be killed, and they would hold the port for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise KvdError("the process that started this one has ended")


def _all_ready(heard: int, count: int) -> bool:
    said = b""
    while len(said) < count and (more := os.read(heard, count)):
        said += more
    os.close(heard)
    return len(said) == count
