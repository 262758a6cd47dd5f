"""The sockets of the node's stream of prefix events, and what feeds it: workers' publishers and kvd's own tiers.

Nothing is encoded or sent within a worker's request: what changed is noted, and said some milliseconds later, a part
at a time. PUB drops what a subscriber does not take; it notices by the numbers, and asks.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import zmq

from kvd import wire
from kvd.daemon.holdings import Holdings, attached
from kvd.daemon.node import Node
from kvd.daemon.promotion import Lower
from kvd.daemon.readers import Frames, Readers
from kvd.daemon.stock import MEDIA
from kvd.daemon.stream import Held, Stream, snapshot
from kvd.daemon.workers import Workers
from kvd.errors import SettingsError
from kvd.settings import EventSettings
from kvd.sglang_events import END, AnyEvent

log = logging.getLogger("kvd.events")

LINGER_S = 0.01  # changes wait for others to go out with them
HEARTBEAT_S = 1.0
_QUEUE = 20_000  # batches for a subscriber that is slow
_MOST_REQUEST_BYTES = 4096


class Events:
    """Binds at once. Raises SettingsError where an endpoint cannot be used. `close` may be called twice."""

    def __init__(self, settings: EventSettings, epoch: int, node: Node, mode: int) -> None:
        """`mode`: the permission of sockets that are files."""
        assert settings.endpoint is not None, "there is a stream"
        self._loop = asyncio.get_running_loop()
        self._stream = Stream(settings.node or socket.gethostname(), epoch, settings.replay_batches)
        self._due: asyncio.Handle | None = None
        self._beat_at = 0.0
        self._context = zmq.Context()
        self._pub = self._bound(zmq.PUB, settings.endpoint, mode)
        self._pub.setsockopt(zmq.SNDHWM, _QUEUE)
        self._readers = Readers(self._bound(zmq.ROUTER, settings.replay, mode), self._answer)
        self.holdings = Holdings(settings.most_blocks, node.labels, self._say, self._wake)
        self.workers = Workers(self._context, settings.workers, settings.most_blocks, self._say)
        self._counters = node.stock.counters
        self._sessions = node.sessions
        self._tiers = node.promotion.tiers
        node.stock.follow(self.holdings)
        log.info("prefix events at %s, snapshots at %s", settings.endpoint, settings.replay)

    def tick(self, now: float) -> None:
        """What is due: questions to workers, what became known of namespaces, a sign of life."""
        self.workers.tick(now)
        self.holdings.tick(attached(self.workers.names, self._sessions.all()))
        if now - self._beat_at >= HEARTBEAT_S:
            self._beat_at = now
            self._say(wire.Source(speeds=speeds(self._tiers)), (), "")
            self._count()

    def _count(self) -> None:
        """What `kvdctl status` shows."""
        publishers = self.workers.publishers
        self._counters["event_batches"] = self._stream.seq + 1
        self._counters["event_publishers"] = len(publishers)
        self._counters["event_publishers_exact"] = sum(publisher.mirror.exact for publisher in publishers)
        self._counters["event_publishers_strange"] = sum(publisher.source.strange for publisher in publishers)
        self._counters["event_pages_untold"] = self.holdings.untold
        self._counters["event_batches_lost"] = sum(publisher.mirror.lost for publisher in publishers)

    def close(self) -> None:
        if self._due is not None:
            self._due.cancel()
        if not self._context.closed:
            self.workers.close()
            self._readers.close()
            self._pub.close(0)
            self._context.term()

    def _bound(self, kind: int, endpoint: str, mode: int) -> "zmq.Socket[bytes]":
        found = self._context.socket(kind)
        for option, value in ((zmq.LINGER, 0), (zmq.MAXMSGSIZE, _MOST_REQUEST_BYTES), (zmq.HANDSHAKE_IVL, 2000)):
            found.setsockopt(option, value)
        try:
            found.bind(endpoint)
            if endpoint.startswith("ipc:///"):
                Path(endpoint.removeprefix("ipc://")).chmod(mode)
        except (zmq.ZMQError, OSError) as error:
            found.close(0)
            raise SettingsError(f"cannot publish at {endpoint}: {error}", "choose another events.endpoint") from error
        return found

    def _say(self, source: wire.Source, events: Sequence[AnyEvent], why: str) -> None:
        self._stream.say(source, events, why)
        self._wake()

    def _wake(self) -> None:
        if self._due is None:
            self._due = self._loop.call_later(LINGER_S, self._go_on)

    def _go_on(self) -> None:
        more = self.holdings.drain()
        self._flush()
        self._due = self._loop.call_soon(self._go_on) if more else None

    def _flush(self) -> None:
        for message in self._stream.flush(time.time()):
            self._pub.send_multipart(message, zmq.NOBLOCK)

    def _answer(self, request: bytes) -> Iterator[Frames]:
        """SGLang's request for a replay, or ours for a snapshot."""
        if len(request) == len(END):
            self._flush()
            past = self._stream.replay(int.from_bytes(request))
            return iter([*((b"", *message) for message in past), (b"", b"", END, b"")])
        parts = snapshot(wire.decode_to_stream(request).request, self._stream, self._sources, self._flush)
        return ((b"", wire.encode(part)) for part in parts)

    def _sources(self) -> list[Held]:
        return [*self.workers.publishers, *self.holdings.sources()]


def speeds(tiers: Iterable[Lower]) -> tuple[wire.Speed, ...]:
    """Of those that were measured, in two digits: what wavers is said seldom."""
    return tuple(
        wire.Speed(MEDIA[tier.bit], float(f"{tier.disk.bytes_per_s:.1e}"), float(f"{tier.disk.latency_s:.1e}"))
        for tier in tiers
        if tier.disk.known
    )
