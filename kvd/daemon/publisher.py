"""The connection to one publisher: one rank of a worker. Feeds its mirror, and asks again for what was lost.

Subscribes before it asks for the history, so that nothing falls between the two. One replay at a time, each over a
socket of its own: what comes late of an earlier one is nobody's. ZeroMQ tells of a broken connection before it hands
out what came over the next one; so a message is taken first, and then looked whether the connection broke before it.
"""

import logging
from collections.abc import Callable, Sequence

import msgspec
import zmq

from kvd import wire
from kvd.daemon.discovery import Address
from kvd.daemon.mirror import UNREADABLE, Blocks, Mirror
from kvd.daemon.rootnames import RootNames
from kvd.errors import PeerError
from kvd.pump import Pump
from kvd.sglang_events import MAX_BATCH_BYTES, AnyEvent, Batch, decode, read_frames, seq_frame

log = logging.getLogger("kvd.events")

CHECK_AFTER_S = 10.0  # of silence: a batch that was lost may have been the last one
_BEGIN_S, _PAUSE_S, _AGAIN_S = 5.0, 1.0, 1.0  # until a replay begins, within it, and between two
_MOST_UNENDED = 2  # of those: a publisher that is alive repeats what it has, whatever its worker does
_QUEUE = 10_000  # batches ahead of us; what is dropped beyond is asked for again

Say = Callable[[wire.Source, Sequence[AnyEvent], str], None]
Context = zmq.Context[zmq.Socket[bytes]]


class Publisher:
    """`broke`: the connection was lost since somebody last set this to False. `close` may be called twice."""

    def __init__(self, context: Context, url: str, at: Address, most_blocks: int, say: Say, life: str = "") -> None:
        self.at = at
        self.source = wire.Source(url, at.rank, block_tokens=at.block_tokens, life=life)
        self.mirror = Mirror(most_blocks)
        self.broke = False
        self._names = RootNames()
        self._say = say
        self._said = ""
        self._context = context
        self._replay: Pump | None = None
        self._heard = self._heard_replay = False  # since the last tick
        self._begun = False  # something of the replay has come
        self._unended = 0  # replays in a row that did not end
        self._heard_at = self._asked_at = -1e9
        subscriber = self._socket(zmq.SUB)
        subscriber.setsockopt(zmq.RCVHWM, _QUEUE)
        subscriber.setsockopt(zmq.SUBSCRIBE, at.topic.encode())
        self._breaks = Pump(subscriber.get_monitor_socket(zmq.EVENT_DISCONNECTED), self._broken)
        subscriber.connect(at.events)
        self._live = Pump(subscriber, self._published)
        self._tell([])

    @property
    def held(self) -> dict[str, Blocks]:
        return self.mirror.held

    @property
    def why(self) -> str:
        return self.mirror.why

    def lives(self, life: str) -> None:
        """Which life of the worker this is: see kvd.sglang_info."""
        if life != self.source.life:
            self._names = RootNames()
            self.source = msgspec.structs.replace(self.source, life=life, strange=False)
            self._say(self.source, [], self.mirror.why)

    def tick(self, now: float) -> None:
        """Ask for what is missing, and after a silence whether anything is; give up on answers that do not come."""
        if self._heard:
            self._heard, self._heard_at = False, now
        if self._heard_replay:
            self._heard_replay, self._begun, self._asked_at = False, True, now
        if self._replay is not None:
            if now - self._asked_at > (_PAUSE_S if self._begun else _BEGIN_S):
                self._end_replay()
                self._unended += 1
                if self._unended < _MOST_UNENDED:
                    self.mirror.check()
                else:  # it hangs, or is gone without a word
                    self.mirror.doubt("the worker's publisher does not answer; it is asked again and again")
                    self._tell([])
            return
        if self.mirror.ask is None and now - self._heard_at > CHECK_AFTER_S:
            self._heard_at = now
            if self.at.replay is not None:
                self.mirror.check()
        if self.mirror.ask is not None and (self.at.replay is None or now - self._asked_at > _AGAIN_S):
            self._asked_at = now
            self._ask(self.mirror.ask)

    def close(self) -> None:
        self._end_replay()
        self._breaks.close()
        self._live.close()

    def _published(self, frames: list[bytes]) -> None:
        self._breaks.drain()
        self._heard = True
        if (message := self._read(frames)) is not None:
            self._tell(self.mirror.live(*message))

    def _broken(self, _: list[bytes]) -> None:
        self.broke = True
        self._end_replay()
        self.mirror.doubt()
        self._tell([])

    def _ask(self, start: int) -> None:
        if self.at.replay is None:
            self._tell(self.mirror.no_replay())
            return
        socket = self._socket(zmq.DEALER)
        socket.connect(self.at.replay)
        socket.send_multipart((b"", seq_frame(start)), zmq.NOBLOCK)
        self._replay, self._begun = Pump(socket, self._replayed), False

    def _replayed(self, frames: list[bytes]) -> None:
        self._heard_replay = True
        try:
            ended = read_frames(frames) is None
        except PeerError:
            ended = False
        if ended:
            self._unended = 0
            self._end_replay()
            self._tell(self.mirror.replay_ended())
        elif (message := self._read(frames)) is not None:
            self._tell(self.mirror.replayed(*message))

    def _read(self, frames: list[bytes]) -> tuple[int, Batch] | None:
        """Number and batch; None where there is not even a number."""
        seq = -1
        try:
            message = read_frames(frames)
            if message is None:
                return None
            seq = message[0]
            return seq, decode(message[1])
        except PeerError as error:
            log.warning("%s rank %d: %s", self.source.worker, self.source.rank, error)
            return (seq, UNREADABLE) if seq >= 0 else None

    def _tell(self, changed: list[AnyEvent]) -> None:
        self._names.look(changed)
        if self._names.strange and not self.source.strange:
            log.error(
                "%s rank %d names blocks otherwise than this kvd knows: no router will find them by their tokens",
                self.source.worker, self.source.rank,
            )  # fmt: skip
            self.source = msgspec.structs.replace(self.source, strange=True)
        if changed or self._said != self.mirror.why:
            self._said = self.mirror.why
            self._say(self.source, changed, self._said)

    def _end_replay(self) -> None:
        if self._replay is not None:
            self._replay.close()
            self._replay = None

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        for option, value in ((zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_BATCH_BYTES), (zmq.HANDSHAKE_IVL, 2000)):
            socket.setsockopt(option, value)
        return socket
