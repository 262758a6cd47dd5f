"""The node's stream of prefix events: what changed becomes numbered batches, the last ones are remembered. Pure.

Frames and numbers as kvd.wire.stream has them. A batch is of one source; what one source says stays in order. Nothing
is encoded before `flush`. The batches remembered for replays are bounded by number and by bytes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvd import wire
from kvd.brief import first_frame
from kvd.daemon.mirror import Blocks
from kvd.sglang_events import AnyEvent, Batch, Removed, encode, seq_frame

MOST_REMEMBERED_BYTES = 64 << 20
_EVENTS_PER_BATCH = 1024
_ABSENT = object()

Message = tuple[bytes, bytes, bytes]  # topic and brief, number, batch


class Held(Protocol):
    """One source: what it holds now, by medium, and what is not known of it."""

    @property
    def source(self) -> wire.Source: ...
    @property
    def why(self) -> str: ...
    @property
    def held(self) -> dict[str, Blocks]: ...


@dataclass(slots=True)
class _Open:
    """What a source has to say."""

    source: wire.Source
    why: str
    events: list[AnyEvent] = field(default_factory=list)


class Stream:
    """`seq`: of the last batch that was numbered, -1 before the first."""

    def __init__(self, node: str, epoch: int, depth: int) -> None:
        """`depth`: how many batches are remembered."""
        self.node = node
        self.epoch = epoch
        self.seq = -1
        self._open: dict[tuple[str, int, str], _Open] = {}
        self._ranks: dict[tuple[str, int], int] = {}
        self._past: deque[Message] = deque()
        self._past_bytes = 0
        self._depth = depth

    def say(self, source: wire.Source, events: Sequence[AnyEvent] = (), why: str = "") -> None:
        """These changes go out with the next flush; without any, what is said of the source does."""
        said = self._open.setdefault((source.worker, source.rank, source.namespace), _Open(source, why))
        said.source, said.why = source, why
        said.events += events

    def flush(self, time_s: float) -> list[Message]:
        """Number what was said, to be sent in this order. `time_s`: since 1970."""
        messages: list[Message] = []
        said, self._open = self._open, {}
        for one in said.values():
            for at in range(0, max(1, len(one.events)), _EVENTS_PER_BATCH):
                events = one.events[at : at + _EVENTS_PER_BATCH] or [Removed(block_hashes=[])]
                for event in events:
                    event.kvd = None  # a worker has no say in it
                head = events[0].kvd = wire.Head(self.node, self.epoch, one.source, one.why)
                batch = encode(Batch(time_s, events, self._rank(one.source)))
                messages.append(self._numbered(first_frame(head, events), batch))
        return messages

    def replay(self, start: int) -> list[Message]:
        """The remembered batches from a number on."""
        oldest = self.seq + 1 - len(self._past)
        return [message for seq, message in enumerate(self._past, oldest) if seq >= start]

    def _numbered(self, first: bytes, batch: bytes) -> Message:
        self.seq += 1
        message = (first, seq_frame(self.seq), batch)
        self._past.append(message)
        self._past_bytes += sum(map(len, message))
        while len(self._past) > self._depth or self._past_bytes > MOST_REMEMBERED_BYTES:
            self._past_bytes -= sum(map(len, self._past.popleft()))
        return message

    def _rank(self, source: wire.Source) -> int | None:
        """What others take for a data-parallel rank: another number for each rank of each worker of the node."""
        if not source.worker:
            return None
        return self._ranks.setdefault((source.worker, source.rank), len(self._ranks))


def snapshot(
    request: int, stream: Stream, sources: Callable[[], Iterable[Held]], flush: Callable[[], None]
) -> Iterator[wire.SnapshotPart]:
    """All blocks, part by part; each is true when it is taken from here. `flush` sends what was said until then.

    A source that is gone by then is told of no more: it has said so, and another may bear its name.
    """

    def here(one: Held) -> bool:
        flush()
        return any(one is other for other in sources())

    for one in list(sources()):
        if not here(one):
            continue
        yield wire.SnapshotPart(request, stream.node, stream.epoch, stream.seq, one.source, one.why)
        for medium in list(one.held):
            hashes = list(one.held.get(medium, ()))
            for at in range(0, len(hashes), wire.PART_BLOCKS):
                if not here(one):
                    break
                blocks = one.held.get(medium, {})
                yield wire.SnapshotPart(
                    request, stream.node, stream.epoch, stream.seq, one.source, one.why, medium,
                    runs(blocks, hashes[at : at + wire.PART_BLOCKS]),
                )  # fmt: skip
    flush()
    yield wire.SnapshotPart(request, stream.node, stream.epoch, stream.seq, None)


def runs(blocks: Blocks, hashes: Sequence[int]) -> list[wire.Run]:
    """Those of the hashes that are held, as runs of parents and children."""
    found: list[wire.Run] = []
    run: list[int] = []
    first: int | None = None
    for value in hashes:
        parent = blocks.get(value, _ABSENT)
        if parent is _ABSENT:
            continue
        if run and parent == run[-1]:
            run.append(value)
            continue
        if run:
            found.append((first, wire.pack_hashes(run)))
        first, run = parent, [value]  # type: ignore[assignment]
    if run:
        found.append((first, wire.pack_hashes(run)))
    return found
