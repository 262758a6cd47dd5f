"""A lower tier in a process of its own: `python -m kvd.storage.serve SETTINGS`, started by kvd.

A disk that hangs hangs this process; a medium that fails under LMDB's mapping kills it (SIGBUS); kvd sees it, answers
misses and starts another. Before it is used, and else as soon as it holds something, the tier reads a few of its pages
for nobody: kvd must know how fast it is before a request depends on it. SETTINGS is JSON: {"tier": "nvme" or "shared",
"socket": fd, "arena": fd, ...its own}. Loads run on several threads, stores and removals on one, in their order. Ends
when kvd hangs up.

Always true: what kvd stores and removes, and news of the same pages, it hears in the order in which it was so: who
puts, removes or takes news keeps `_telling` until it is told. Apart from that are a load's misses, and what another
node does to a page between our put and our telling of it: kvd may then ask for a page that is gone, a miss.
"""

import contextlib
import json
import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvd.errors import KvdError
from kvd.storage import tierwire
from kvd.storage.lineage import meant
from kvd.storage.quota import Share
from kvd.storage.tier import Name, Tier, TierError, WriteRefused

GAUGE_EVERY_S = 0.5
_ALIGN = 4096
_MEASURE_PAGES, _MEASURE_BYTES = 9, 64 << 20
_MEASURE_S = 0.1  # where one page takes longer, it says enough
_REMOVED_AT_ONCE = 1024  # kvd evicts these from RAM too
_NAMES_AT_ONCE = 4096  # kvd enters them into its index a message at a time, between its workers' requests


class Server:
    """Serves one tier to one kvd."""

    def __init__(self, tier: Tier, sock: socket.socket, arena: memoryview, loaders: int) -> None:
        self._tier = tier
        self._sock = sock
        self._arena = arena
        self._send_lock = threading.Lock()
        self._telling = threading.Lock()
        self._loaders = loaders
        self._measured = False
        self._stores: queue.SimpleQueue[tierwire.ToTier] = queue.SimpleQueue()
        self._loads: queue.SimpleQueue[tierwire.Load] = queue.SimpleQueue()

    def serve(self) -> None:
        """Until kvd hangs up."""
        for work in (self._store_forever, self._news_forever, *[self._load_forever] * self._loaders):
            threading.Thread(target=self._or_die, args=(work,), daemon=True).start()
        inbox = bytearray()
        while data := self._sock.recv(1 << 20):
            inbox += data
            while (body := tierwire.take_frame(inbox)) is not None:
                message = tierwire.decode_to_tier(body)
                if isinstance(message, tierwire.Load):
                    self._loads.put(message)
                else:
                    self._stores.put(message)

    def send(self, message: tierwire.FromTier) -> None:
        with self._send_lock:
            self._sock.sendall(tierwire.frame(message))

    def _or_die(self, work: Callable[[], None]) -> None:
        """A thread of ours ends because the medium fails, kvd is gone, or by a bug: kvd starts another process."""
        try:
            work()
        except TierError as error:
            self.send(trouble(error))
            os._exit(1)
        except OSError:  # the socket: what the medium does is a TierError
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)

    def _buffers(self, offsets: Sequence[int], length: int) -> list[memoryview]:
        return [self._arena[offset : offset + _aligned(length)] for offset in offsets]

    def _load_forever(self) -> None:
        while True:
            request = self._loads.get()
            names = tierwire.split(request.names)
            wanted = [(n, self._buffers(o, request.length)) for n, o in zip(names, request.offsets, strict=True)]
            found = self._tier.get(wanted)
            rows = [None if page is None else tierwire.Row.of(page, []) for page in found]
            self.send(tierwire.Loaded(request.request, rows))

    def _store_forever(self) -> None:
        while True:
            self.do(self._stores.get())

    def do(self, message: tierwire.ToTier) -> None:
        """What is not a load."""
        match message:
            case tierwire.Store():
                self._store(message)
            case tierwire.Remove():
                self._remove(message)
            case tierwire.Judge(density):
                self._tier.judge(density)
            case tierwire.Belongs(namespace, tenant):
                self._tier.belongs(namespace, tenant)
            case tierwire.Used(names, kinds):
                self._tier.used(list(zip(tierwire.split(names), kinds, strict=True)))

    def _store(self, request: tierwire.Store) -> None:
        pages = [(row.page, self._buffers(row.offsets, row.length)) for row in request.rows]
        with self._telling:
            flags = self._tier.put(pages)
            self._tell_news()  # before the answer: kvd must know what left before it believes what came
            self.send(tierwire.Stored(request.request, flags))
        self._measure([page.name for (page, _), held in zip(pages, flags, strict=True) if held])

    def _remove(self, request: tierwire.Remove) -> None:
        trouble = ""
        try:
            for names in meant(self._tier, request.namespace, request.key):
                with self._telling:
                    self._tier.remove(names)
                    for at in range(0, len(names), _REMOVED_AT_ONCE):
                        part = b"".join(names[at : at + _REMOVED_AT_ONCE])
                        self.send(tierwire.Removed(request.request, part, False))
        except WriteRefused as error:  # it may be read still
            trouble = str(error)
        self.send(tierwire.Removed(request.request, b"", True, trouble))

    def _news_forever(self) -> None:
        for names in self._tier.names():  # nobody stores yet: that begins with the first gauge
            self._measure(names)
            for at in range(0, len(names), _NAMES_AT_ONCE):
                self.send(tierwire.Changed(b"".join(names[at : at + _NAMES_AT_ONCE]), b""))
        threading.Thread(target=self._or_die, args=(self._gauge_forever,), daemon=True).start()
        while True:
            self.tend()
            time.sleep(GAUGE_EVERY_S)

    def tend(self) -> None:
        """And tell what came of it. Stores go on while the tier looks for others' pages, which may take long."""
        self._tier.tend()
        with self._telling:
            self._tell_news()

    def _measure(self, names: Sequence[Name]) -> None:
        """Read a page, then several where that was quick. Once; of a tier that holds nothing yet, later."""
        if self._measured or not names:
            return
        self._measured = True
        pages = [page for page in self._tier.find(names[:_MEASURE_PAGES]) if page is not None]
        for some in (pages[:1], pages[1:]):
            room = memoryview(mmap.mmap(-1, _MEASURE_BYTES))
            wanted, at = [], 0
            for page in some:
                step, end = _aligned(page.length), at + page.shards * _aligned(page.length)
                if end <= len(room):
                    wanted.append((page.name, [room[start : start + step] for start in range(at, end, step)]))
                    at = end
            started = time.monotonic()
            whole = all(page is not None for page in self._tier.get(wanted))
            seconds = time.monotonic() - started
            if at and whole:
                self.send(tierwire.Measured(at, seconds))
            if not at or not whole or seconds > _MEASURE_S:
                return

    def _gauge_forever(self) -> None:
        while True:
            self.send(
                tierwire.Gauge(
                    *self._tier.usage(), dict(self._tier.counters), floor=self._tier.floor, held=self._tier.held()
                )
            )
            time.sleep(GAUGE_EVERY_S)

    def _tell_news(self) -> None:
        """While `_telling` is held."""
        came, left = self._tier.news()
        if came or left:
            self.send(tierwire.Changed(b"".join(came), b"".join(left)))


def _aligned(length: int) -> int:
    return -(-length // _ALIGN) * _ALIGN


def trouble(error: KvdError) -> tierwire.Gauge:
    """The last words of a tier that cannot work."""
    return tierwire.Gauge(0, 0, 0, {}, str(error))


def open_tier(settings: dict[str, Any]) -> Tier:
    """The tier that the settings describe. Raises TierError."""
    kind = settings["tier"]
    if kind == "nvme":
        from kvd.storage.nvme import NvmeTier

        mount_point = settings["mount_point"]
        return NvmeTier(
            Path(settings["path"]), settings["size_bytes"], settings["segment_bytes"], settings["threads"],
            settings["ttl_s"], mount_point and Path(mount_point),
            _shares(settings),
        )  # fmt: skip
    if kind == "shared":
        from kvd.storage.shared import SharedTier

        return SharedTier(
            settings["uri"], settings["node"], settings["quota_bytes"], settings["file_bytes"], settings["poll_s"],
            settings["ttl_s"], shares=_shares(settings),
        )  # fmt: skip
    raise TierError(f"unknown tier {kind}")


def _shares(settings: dict[str, Any]) -> dict[str, Share]:
    return {tenant: Share(*share) for tenant, share in settings["shares"].items()}


def main() -> None:
    settings = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):  # these are for kvd, which writes what is left and then hangs up
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=settings["socket"])
    arena = mmap.mmap(settings["arena"], os.fstat(settings["arena"]).st_size)
    os.close(settings["arena"])
    try:
        tier = open_tier(settings)
    except KvdError as error:
        sock.sendall(tierwire.frame(trouble(error)))
        sys.exit(1)
    with contextlib.suppress(ConnectionError):  # kvd was killed with something of ours unread
        Server(tier, sock, memoryview(arena), settings["threads"]).serve()
    os._exit(0)  # threads may be in the middle of a write; what was not acknowledged does not count


if __name__ == "__main__":
    main()
