"""The sockets through which a router follows one node's stream, for its view of the node.

Subscribes before it asks for a snapshot. Each request goes over a socket of its own: what comes late of an earlier one
is nobody's. What a node sends that cannot be read is counted: a batch makes a gap, which heals like any other; for a
part of a snapshot all of it is asked for anew.
"""

import logging

import zmq

from kvd import wire
from kvd.brief import Briefs
from kvd.errors import PeerError
from kvd.pump import Pump, receive_but_last
from kvd.router.view import Ask, View
from kvd.sglang_events import MAX_BATCH_BYTES, seq_frame

log = logging.getLogger("kvd.router")

_QUEUE = 20_000  # batches; what is dropped beyond is asked for again
_PART_FRAMES = 2
_LATE_S = 1.0  # between two ticks

Context = zmq.Context[zmq.Socket[bytes]]


class Follow:
    """Lives on the event loop. `tick` some ten times a second. `close` may be called twice."""

    def __init__(self, context: Context, endpoint: str, replay_endpoint: str, view: View) -> None:
        self.view = view
        self.unreadable = 0
        self._context = context
        self._replay_endpoint = replay_endpoint
        self._endpoint = endpoint
        self._answers: Pump | None = None
        self._briefs = Briefs()
        self._now = -1e9
        subscriber = self._socket(zmq.SUB)
        subscriber.setsockopt(zmq.RCVHWM, _QUEUE)
        subscriber.setsockopt(zmq.SUBSCRIBE, wire.TOPIC)
        self._breaks = Pump(subscriber.get_monitor_socket(zmq.EVENT_DISCONNECTED), lambda _: self.view.doubt())
        subscriber.connect(endpoint)
        self._live = Pump(subscriber, self._published, receive_but_last)

    def tick(self, now: float) -> None:
        """Ask for what the view misses; not when this comes late, for then what lies in the sockets was not read."""
        late = now - self._now > _LATE_S
        self._now = now
        wanted = None if late else self.view.ask(now)
        if wanted is not None:
            self._ask(wanted)

    def close(self) -> None:
        """The view keeps what it has; close that too, unless another connection goes on with it."""
        self._end_answers()
        self._breaks.close()
        self._live.close()

    def _ask(self, wanted: Ask) -> None:
        self._end_answers()
        try:
            socket = self._socket(zmq.DEALER)
        except zmq.ZMQError as error:  # there is no descriptor to be had: the view asks again
            log.warning("%s cannot be asked what is missing: %s", self._replay_endpoint, error)
            return
        socket.connect(self._replay_endpoint)
        request = wire.encode(wire.GetSnapshot(wanted.request)) if wanted.start is None else seq_frame(wanted.start)
        socket.send_multipart((b"", request), zmq.NOBLOCK)
        self._answers = Pump(socket, self._answered)

    def _published(self, frames: list[bytes]) -> None:
        try:
            message = self._briefs.read(frames)
            if message is not None:
                self.view.batch(*message, self._now)
        except PeerError as error:
            self._blame(error)

    def _answered(self, frames: list[bytes]) -> None:
        try:
            if len(frames) == _PART_FRAMES:
                self.view.part(wire.decode_from_stream(frames[1]), self._now)
            elif (message := self._briefs.read(frames)) is not None:
                self.view.batch(*message, self._now)
            else:
                self._end_answers()
                self.view.replay_ended(self._now)
        except PeerError as error:
            self.view.spoilt(self._now)
            self._blame(error)
        if len(frames) == _PART_FRAMES and not self.view.loading:
            self._end_answers()  # what may still come is of no use

    def _blame(self, error: PeerError) -> None:
        if not self.unreadable:
            log.warning("%s: %s", self._endpoint, error)
        self.unreadable += 1

    def _end_answers(self) -> None:
        if self._answers is not None:
            self._answers.close()
            self._answers = None

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        for option, value in ((zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_BATCH_BYTES), (zmq.HANDSHAKE_IVL, 2000)):
            socket.setsockopt(option, value)
        return socket
