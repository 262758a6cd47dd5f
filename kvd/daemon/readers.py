"""Who asked for a replay or a snapshot, over a ZeroMQ ROUTER: each gets its messages as fast as it takes them.

One message to each in a turn of the loop, so that a snapshot of millions of blocks holds nobody up. A reader has one
answer at a time, a new request ends the one before; one that takes nothing, or is gone, is dropped.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq

from kvd.errors import PeerError
from kvd.pump import Pump

log = logging.getLogger("kvd.events")

AHEAD = 16  # messages on their way to a reader
_PATIENCE_S = 30.0
_RETRY_S = 0.005
_MOST = 256

Frames = tuple[bytes, ...]


@dataclass(slots=True)
class _Reader:
    messages: Iterator[Frames]
    taken_at: float
    unsent: Frames | None = None


class Readers:
    """Owns the socket. `answer(request)` returns the messages, made as they are sent, or raises PeerError."""

    def __init__(self, socket: "zmq.Socket[bytes]", answer: Callable[[bytes], Iterator[Frames]]) -> None:
        socket.setsockopt(zmq.SNDHWM, AHEAD)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reader that is slow is told from one that is gone
        self._answer = answer
        self._readers: dict[bytes, _Reader] = {}
        self._turn: asyncio.Handle | None = None
        self._pump = Pump(socket, self._asked)

    def close(self) -> None:
        """Idempotent."""
        if self._turn is not None:
            self._turn.cancel()
        self._pump.close()

    def _asked(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 3 or frames[1]:
                raise PeerError(f"{len(frames) - 1} frames")
            if len(self._readers) >= _MOST and frames[0] not in self._readers:
                raise PeerError(f"{_MOST} others are being answered")
            self._readers[frames[0]] = _Reader(self._answer(frames[2]), time.monotonic())
        except PeerError as error:
            log.warning("ignored a request for prefix events: %s", error)
            return
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._serve)

    def _serve(self) -> None:
        went_on = [self._serve_one(identity, reader) for identity, reader in list(self._readers.items())]
        self._pump.drain()
        self._turn = None
        if self._readers:
            self._turn = asyncio.get_running_loop().call_later(0.0 if any(went_on) else _RETRY_S, self._serve)

    def _serve_one(self, identity: bytes, reader: _Reader) -> bool:
        """Whether it took a message."""
        now = time.monotonic()
        if reader.unsent is None:
            reader.unsent = next(reader.messages, None)
        if reader.unsent is None:
            del self._readers[identity]
            return True
        try:
            self._pump.socket.send_multipart((identity, *reader.unsent), zmq.NOBLOCK)
        except zmq.Again:
            if now - reader.taken_at > _PATIENCE_S:
                log.warning("a reader of prefix events took nothing for %.0f s: dropped", _PATIENCE_S)
                del self._readers[identity]
            return False
        except zmq.ZMQError:
            del self._readers[identity]  # it hung up
            return True
        reader.unsent, reader.taken_at = None, now
        return True
