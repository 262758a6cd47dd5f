"""The process of a lower tier, as the daemon sees it: started, asked, watched, killed and started again.

Always true: an answer comes exactly once, and only when that process can touch the request's memory no more: it
answered, or it is dead and reaped. A medium that hangs so that even SIGKILL waits keeps its slots until it lets go.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvd.errors import UNDECODABLE
from kvd.storage import tierwire
from kvd.storage.tier import Name, Page

log = logging.getLogger("kvd.tier")

SILENT_AFTER_S = 10.0  # it says how it is twice a second
OPENING_AFTER_S = 600.0  # what it says until it works is little: a large catalog takes minutes
START_AFTER_S = (0.2, 30.0)  # a failure: first, longest
_OPENING = "opening"
_ENDED = "its process ended"
_FULL = 0.95
_REMOVAL_PATIENCE_S = 300.0  # it may have to read a whole catalog; meanwhile stores wait for it
_WELL_AFTER_S = 60.0  # up for as long, a failure is the first again

Loaded = Callable[[list[Page | None]], None]
Stored = Callable[[list[bool]], None]
Left = Callable[[list[Name]], None]
Ended = Callable[[str], None]  # with what went wrong


@dataclass(slots=True)
class Gauge:
    """What the tier last said of itself."""

    pages: int = 0
    bytes_used: int = 0
    bytes_total: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)  # bytes of each tenant that has a share
    floor: float | None = None  # a page of less density is not worth storing; None: it cannot tell


class Below:
    """One lower tier. All calls and callbacks on the event loop's thread; `close` may be called twice."""

    def __init__(
        self, name: str, settings: dict[str, Any], arena_fd: int,
        changed: Callable[[list[Name], list[Name]], None], forgotten: Callable[[], None], works: Callable[[], None],
        measured: Callable[[int, float], None], patience_s: float,
    ) -> None:  # fmt: skip
        self.name = name
        self.gauge = Gauge()
        self.trouble = "not started yet"
        self.restarts = 0
        self._last_words = ""
        self._settings = settings
        self.shares: dict[str, tuple[int, int | None]] = settings.get("shares", {})  # reserve and burst, by tenant
        self._arena_fd = arena_fd
        self._changed = changed  # names came or left
        self._forgotten = forgotten  # all that came before is unknown again
        self._measured = measured  # bytes, and the seconds they took
        self._works = works  # all that it holds has been said, and it can be used
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._inbox, self._outbox = bytearray(), bytearray()
        self._request = 0
        self._patience_s = patience_s  # the longest that one request may take
        self._loads: dict[int, tuple[int, Loaded]] = {}
        self._stores: dict[int, tuple[int, Stored]] = {}
        self._removals: dict[int, tuple[Left, Ended]] = {}
        self._asked: dict[int, float] = {}  # when, in order
        self._heard = self._began = self._start_at = time.monotonic()
        self._wait_s = START_AFTER_S[0]
        self._closed = False

    @property
    def ready(self) -> bool:
        """It works, as far as is known."""
        return self._sock is not None and not self.trouble

    # -- asking --------------------------------------------------------------------------------------------

    def load(self, length: int, wanted: Sequence[tuple[Name, list[int]]], done: Loaded) -> None:
        """Read pages into the arena. `done` may be called at once."""
        self._request += 1
        self._asked[self._request] = time.monotonic()
        self._loads[self._request] = (len(wanted), done)
        self._send(tierwire.Load(self._request, length, b"".join(name for name, _ in wanted), [o for _, o in wanted]))

    def store(self, pages: Sequence[tuple[Page, list[int]]], done: Stored) -> None:
        """Write pages from the arena. `done` may be called at once."""
        self._request += 1
        self._asked[self._request] = time.monotonic()
        self._stores[self._request] = (len(pages), done)
        self._send(tierwire.Store(self._request, [tierwire.Row.of(page, offsets) for page, offsets in pages]))

    def judge(self, density: Sequence[float]) -> None:
        """Tell what was learnt of which pages are worth keeping."""
        self._send(tierwire.Judge(list(density)))

    def used(self, pages: Sequence[tuple[Name, int]]) -> None:
        """Tell which of its pages were used, and of which kinds they are now."""
        self._send(tierwire.Used(b"".join(name for name, _ in pages), bytes(kind for _, kind in pages)))

    def belongs(self, namespace: bytes, tenant: str) -> None:
        """Tell whose pages these are."""
        self._send(tierwire.Belongs(namespace, tenant))

    def wants(self, density: float, before: int) -> bool:
        """Whether a page is worth storing; `before`: how often it had been used before its last use.

        While there is room, any. A full tier that cannot tell what it would lose takes what has been used again.
        """
        if self.gauge.floor is not None:
            return density >= self.gauge.floor
        return before > 0 or self.gauge.bytes_used < _FULL * self.gauge.bytes_total

    def remove(self, namespace: bytes, key: bytes, left: Left, ended: Ended) -> None:
        """Remove pages, see `tierwire.Remove`. `left` hears which, a part at a time; `ended` may be called at once."""
        self._request += 1
        self._asked[self._request] = time.monotonic()
        self._removals[self._request] = (left, ended)
        self._send(tierwire.Remove(self._request, namespace, key))

    def _send(self, message: tierwire.ToTier) -> None:
        if self._sock is None:
            self._fail_all()
            return
        self._outbox += tierwire.frame(message)
        self._flush()

    def _flush(self) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            while self._outbox:
                del self._outbox[: sock.send(self._outbox)]
        except BlockingIOError:
            self._loop.add_writer(sock, self._flush)
            return
        except OSError:
            self._hang_up("its process is gone")
            return
        self._loop.remove_writer(sock)

    # -- hearing -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up(self._last_words or _ENDED)
            return
        self._heard = time.monotonic()
        self._inbox += data
        while self._sock is not None and (body := tierwire.take_frame(self._inbox)) is not None:
            try:
                message = tierwire.decode_from_tier(body)
            except UNDECODABLE as error:
                self._hang_up(f"its process speaks nonsense: {error}")
                return
            self._hear(message)

    def _hear(self, message: tierwire.FromTier) -> None:
        match message:
            case tierwire.Loaded(request, rows):
                del self._asked[request]
                _, loaded = self._loads.pop(request)
                loaded([None if row is None else row.page for row in rows])
            case tierwire.Stored(request, flags):
                del self._asked[request]
                _, stored = self._stores.pop(request)
                stored(flags)
            case tierwire.Removed(request, names, over, trouble):
                left_, ended = self._removals[request]
                left_(tierwire.split(names))
                if over:
                    del self._asked[request], self._removals[request]
                    ended(trouble)
            case tierwire.Changed(came, left):
                self._changed(tierwire.split(came), tierwire.split(left))
            case tierwire.Measured(size, seconds):
                self._measured(size, seconds)
            case tierwire.Gauge(pages, used, total, counters, trouble, floor, held):
                self.gauge = Gauge(pages, used, total, counters, held, floor)
                self._last_words = trouble
                if self.trouble and not trouble:
                    log.info("%s: works", self.name)
                    self.trouble = ""
                    self._works()

    # -- life ----------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Start it when it is time, kill it when it is silent, reap it when it has ended."""
        if self._process is None:
            if now >= self._start_at and not self._closed:
                self._start(now)
        elif self._sock is not None and now - self._heard > self._silent_after_s:
            self._hang_up(f"silent for {self._silent_after_s:.0f} s: does its disk hang?")
        elif self._sock is not None and self._asked and now - next(iter(self._asked.values())) > self._patience:
            self._hang_up(f"silent about a request for {self._patience:.0f} s: does its disk hang?")
        elif self._sock is None and (status := self._process.poll()) is not None:
            self._process = None
            if self.trouble == _ENDED:
                self.trouble = f"{_ENDED}: {_cause(status)}"
                log.warning("%s: %s", self.name, self.trouble)
            self._fail_all()
        elif self.trouble.startswith(_OPENING) and now - self._began > SILENT_AFTER_S:
            self.trouble = f"{_OPENING} for {now - self._began:.0f} s: a large catalog, or a disk that hangs"

    @property
    def _silent_after_s(self) -> float:
        return OPENING_AFTER_S if self.trouble else SILENT_AFTER_S

    @property
    def _patience(self) -> float:
        return _REMOVAL_PATIENCE_S if self._removals else self._patience_s

    def _start(self, now: float) -> None:
        try:
            ours = self._spawn()
        except OSError as error:  # no memory, no processes, no descriptors: later again
            self._start_at = now + START_AFTER_S[1]
            self.trouble = f"cannot start its process: {error}"
            return
        ours.setblocking(False)
        self._sock = ours
        self._inbox.clear()
        self._outbox.clear()
        self._heard = self._began = now
        self._last_words = ""
        if not self.restarts:  # else what it died of stays to be seen until it works again
            self.trouble = _OPENING
        self._loop.add_reader(ours, self._read)

    def _spawn(self) -> socket.socket:
        """Our end of what it is talked to through."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        settings = {**self._settings, "tier": self.name, "socket": theirs.fileno(), "arena": self._arena_fd}
        command = [sys.executable, "-m", "kvd.storage.serve", json.dumps(settings)]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=(theirs.fileno(), self._arena_fd), stdin=subprocess.DEVNULL,
                    env={k: v for k, v in os.environ.items() if not k.startswith(("NOTIFY_", "WATCHDOG_"))},
                )  # fmt: skip
            except OSError:
                ours.close()
                raise
        return ours

    def _hang_up(self, why: str) -> None:
        """Close, kill; `tick` reaps."""
        if self._sock is None or self._process is None:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._sock = None
        self._process.send_signal(signal.SIGKILL)
        now = time.monotonic()
        first, longest = START_AFTER_S
        self._wait_s = first if now - self._began > _WELL_AFTER_S else min(2 * self._wait_s, longest)
        self._start_at = now + self._wait_s
        self.trouble = why
        self.restarts += 1
        self.gauge = Gauge()
        if not self._closed:
            log.warning("%s: %s; starting again in %.1f s", self.name, why, self._wait_s)
        self._forgotten()

    def _fail_all(self) -> None:
        """Nobody will answer any more. Only when there is no process that could still write into the arena."""
        if self._process is not None:
            return  # killed, not reaped: `tick` comes back to it
        loads, stores = list(self._loads.values()), list(self._stores.values())
        removals = list(self._removals.values())
        self._loads.clear()
        self._stores.clear()
        self._removals.clear()
        self._asked.clear()
        for count, loaded in loads:
            loaded([None] * count)
        for count, stored in stores:
            stored([False] * count)
        for _, ended in removals:
            ended(self.trouble or "its process ended")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._hang_up("stopping")
        if self._process is not None:
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                log.warning("%s: its process does not end: does its disk hang?", self.name)


def _cause(status: int) -> str:
    """What a process died of. Most signals leave no last words of their own."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"status {status}, its last words are in kvd's log"
