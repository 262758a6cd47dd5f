"""kvd.data: the hot requests, over a ZeroMQ ROUTER read straight from the event loop.

What an unknown peer sends is ignored; what a known one sends wrongly costs it its session.
"""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import zmq

from kvd import wire
from kvd.errors import PeerError
from kvd.pump import Pump

log = logging.getLogger("kvd.data")

_QUEUE = 16  # a worker has a handful of requests out; what it queues beyond that is its own problem

Respond = Callable[[wire.ToWorker], None]
Answer = Callable[[bytes, wire.FromWorker, Respond], wire.ToWorker | None]


class DataSocket:
    """Binds, answers, closes. `answer(ticket, request, respond)` returns the reply, or None and may `respond` later.

    PeerError drops the session. `admit(False)`: those who are connected go on, nobody else can connect.
    """

    def __init__(self, path: Path, mode: int, answer: Answer, drop: Callable[[bytes, str], None]) -> None:
        self._answer = answer
        self._drop = drop
        self.dropped = 0  # messages that nobody registered for
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, 2000),
            (zmq.RCVHWM, _QUEUE),
            (zmq.SNDHWM, 4 * _QUEUE),
        ):
            self._socket.setsockopt(option, value)
        self._path, self._aside = path, path.with_name(f"{path.name}.full")
        for left in (self._path, self._aside):  # by a daemon that was killed
            left.unlink(missing_ok=True)
        self._socket.bind(f"ipc://{path}")
        path.chmod(mode)
        self._pump = Pump(self._socket, self._handle)

    def admit(self, yes: bool) -> None:
        """By the socket's name: ZeroMQ cannot be told to accept nobody, and to unbind ends who is connected."""
        there, here = (self._aside, self._path) if yes else (self._path, self._aside)
        with contextlib.suppress(OSError):  # mostly: that is its name already
            there.rename(here)

    def _handle(self, parts: list[bytes]) -> None:
        ticket = parts[0][: wire.TICKET_BYTES]
        try:
            if len(parts) != 2:
                raise PeerError(f"{len(parts) - 1} frames")
            reply = self._answer(ticket, wire.decode_from_worker(parts[1]), partial(self._send_late, parts[0]))
        except PeerError as error:
            self.dropped += 1
            self._drop(ticket, str(error))
            return
        if reply is not None:
            self._send(parts[0], reply)

    def _send(self, identity: bytes, reply: wire.ToWorker) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it hung up, or does not read: its deadline will tell it
            self._socket.send_multipart((identity, wire.encode(reply)), zmq.NOBLOCK)

    def _send_late(self, identity: bytes, reply: wire.ToWorker) -> None:
        if not self._socket.closed:
            self._send(identity, reply)
            self._pump.drain()  # sending may have used up the edge that announced a message

    def close(self) -> None:
        """Idempotent."""
        if not self._socket.closed:
            self._pump.close()
            self._context.term()
            self._path.unlink(missing_ok=True)
            self._aside.unlink(missing_ok=True)
