"""What one node holds, as a router knows it: a snapshot and the batches after it, whatever is lost or late. Pure.

Batches and the parts of a snapshot are applied in the order of their numbers (kvd.wire.stream says why that is right).
What comes too early waits; what does not come is asked for, as a replay where the node can still repeat it, else as a
new snapshot. Another epoch is another life of the node's kvd, which begins with a snapshot.

Always true: where `why` is "", what the index has of this node is what the node had said up to batch `seq`. What the
node itself does not know exactly of a source is in `sources`. What waits here is bounded; how many blocks the index
takes is the index's own business.
"""

from array import array
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from kvd import wire
from kvd.brief import Brief, Gone, Kept
from kvd.errors import PeerError
from kvd.router.early import Early
from kvd.router.numbering import Numbering
from kvd.router.sources import Identity, Known, Sources

SILENT_S = 5.0  # the node says something every second
ASK_AGAIN_S = 3.0
_MOST_WAITING = 128 << 20  # bytes of parts of a snapshot, while batches before them are missing: millions of blocks
_RUN_BYTES = 160  # of memory, about, that a run takes besides its hashes
_SPOILT_PAUSE_S = 300.0  # at most, before a snapshot is asked for again that could not be read
_SPOILT = "a part of its snapshot could not be read: is its kvd of this release? it is asked anew, ever less often"


class Index(Protocol):
    """What the router looks prefixes up in. A holder is a number of kvd.router.numbering."""

    def store_all(self, holder: int, stretches: Sequence[tuple[int | None, "array[int]"]]) -> object: ...
    def remove(self, holder: int, hashes: Sequence[int]) -> object: ...
    def clear(self, holder: int) -> object: ...


class Ask(NamedTuple):
    """What to ask the node for: its batches from a number on; or with None a snapshot, under the request's number."""

    start: int | None
    request: int


class _Snapshot(Enum):
    NEEDED = "no snapshot has come yet"
    COMING = "a snapshot is coming in"
    DONE = ""


class View:
    """`seq`: the last batch that was applied, of the life `epoch`. Times are seconds of one clock."""

    def __init__(self, index: Index, holders: Numbering) -> None:
        self.node = ""
        self.epoch: int | None = None
        self.seq = -1
        self.snapshots = self.replays = 0  # asked for
        self._index = index
        self._told = Sources(holders)
        self._head: wire.Head | None = None  # of the last batch, while what it says of its source is known
        self._identity: Identity = ("", 0, "")
        self._early = Early()
        self._parts: list[tuple[wire.SnapshotPart, int]] = []  # that wait for batches, and their bytes of memory
        self._waiting = 0  # bytes of all of them
        self._state = _Snapshot.NEEDED
        self._asked_at = self._heard_at = -1e9
        self._asked_from = -1  # the last replay
        self._request = 0  # the snapshot whose parts are taken; 0: of none
        self._pause_s = ASK_AGAIN_S  # before a snapshot is asked for again; doubled each time that one is spoilt

    @property
    def sources(self) -> Mapping[Identity, Known]:
        return self._told.known

    @property
    def speeds(self) -> Sequence[wire.Speed]:
        """Of the node's tiers."""
        return self._told.speeds

    @property
    def crowded(self) -> bool:
        """See kvd.router.sources."""
        return self._told.crowded

    def why(self, now: float) -> str:
        """Why this view is not exact; "" where it is."""
        if self._state is not _Snapshot.DONE:
            return str(self._state.value) if self._pause_s == ASK_AGAIN_S else _SPOILT
        if self._gap:
            return f"batches from {self.seq + 1} on are missing"
        if now - self._heard_at > SILENT_S:
            return f"the node has said nothing for {SILENT_S:.0f} s, or its connection broke"
        return ""

    def ask(self, now: float) -> Ask | None:
        """What to ask the node for now; it is asked again where nothing comes of it."""
        if now - self._asked_at < (self._pause_s if self._state is _Snapshot.NEEDED else ASK_AGAIN_S):
            return None
        if self._gap or (self._state is _Snapshot.DONE and now - self._heard_at > SILENT_S):
            self._asked_at, self._asked_from = now, self.seq
            self.replays += 1
            return Ask(self.seq + 1, 0)
        if self._state is _Snapshot.DONE:
            return None
        self._start_over()
        self._asked_at = now
        self.snapshots += 1
        self._request = self.snapshots
        return Ask(None, self._request)

    def doubt(self) -> None:
        """The connection broke: not exact until the node is heard again."""
        self._heard_at = -1e9

    def renew(self) -> None:
        """Have all of it told anew, though nothing is missing: what found no room may find some now."""
        if self._state is _Snapshot.DONE:
            self._start_over()

    def batch(self, seq: int, batch: Brief, now: float) -> None:
        """A batch, published or repeated. Raises PeerError where a part of a snapshot waited for it and is wrong."""
        self._heard_at = now
        epoch = batch.head.epoch
        if epoch != self.epoch:
            if self.epoch is not None:
                self._early.clear()
                self._start_over()
            elif not self._request:
                self._asked_at = -1e9
            self._pause_s = ASK_AGAIN_S  # what could not be read may have been another release's
            self.epoch = epoch
        elif seq == self.seq + 1 and self._state is _Snapshot.DONE and not self._early and not self._parts:
            self.seq = seq
            self._apply(batch)
            return
        if seq > self.seq:
            self._early.put(seq, batch, due=seq == self.seq + 1)
        self._go_on()

    def part(self, part: wire.SnapshotPart, now: float) -> None:
        """A part of a snapshot. Raises PeerError where it cannot be."""
        if part.request != self._request:
            return
        self._heard_at = self._asked_at = now
        if part.epoch != self.epoch:
            if self._state is _Snapshot.COMING or self._parts:
                self._start_over()
                return
            self.epoch = part.epoch
            self._early.clear()
        weight = _weight(part)
        self._parts.append((part, weight))
        self._waiting += weight
        self._go_on()
        if self._waiting > _MOST_WAITING:
            self._start_over()
            self._asked_at = now

    @property
    def loading(self) -> bool:
        """Parts of the snapshot that was asked for last are still wanted."""
        return self._request != 0

    def spoilt(self, now: float) -> None:
        """A part of the snapshot that comes in cannot be read: without it more would seem known than is. So none of
        it counts, and all is asked for anew, ever less often: each time the node sends everything. Else a no-op."""
        if self._request:
            self._start_over()
            self._asked_at = now
            self._pause_s = min(2 * self._pause_s, _SPOILT_PAUSE_S)

    def replay_ended(self, now: float) -> None:
        """All that the node could repeat has come. No sign of life by itself: it does not say of which life it is."""
        if self._gap and self.seq == self._asked_from:
            self._start_over()
        elif now - self._heard_at <= SILENT_S:
            self._asked_at = -1e9

    def close(self) -> None:
        """The node is not followed any more: nothing of it stays in the index."""
        self._drop_all()
        self._start_over()

    @property
    def _gap(self) -> bool:
        """The next batch is needed, and others came before it."""
        if self._state is _Snapshot.DONE:
            return self._early.latest > self.seq
        return self._state is _Snapshot.COMING and bool(self._parts)

    def _start_over(self) -> None:
        self._state, self.seq, self._request = _Snapshot.NEEDED, -1, 0
        self._parts.clear()
        self._waiting = 0
        self._asked_at = -1e9

    def _go_on(self) -> None:
        """Apply what is due. While a snapshot comes in, no batch overtakes a part."""
        while True:
            due = self._parts[0][0].seq if self._parts else None
            if due is not None and (self._state is _Snapshot.NEEDED or due == self.seq):
                part, weight = self._parts.pop(0)
                self._waiting -= weight
                self._apply_part(part)
            elif due is not None and due < self.seq:
                self.spoilt(self._heard_at)
                raise PeerError("parts of a snapshot out of order")
            elif (self._parts or self._state is _Snapshot.DONE) and self.seq + 1 in self._early:
                self.seq += 1
                self._apply(self._early.pop(self.seq))
            else:
                return

    def _apply_part(self, part: wire.SnapshotPart) -> None:
        if self._state is _Snapshot.NEEDED:
            self._drop_all()
            self.node, self.seq, self._state = part.node, part.seq, _Snapshot.COMING
            self._early.drop_through(part.seq)
        if part.source is None:
            self._state, self._request, self._pause_s = _Snapshot.DONE, 0, ASK_AGAIN_S
            return
        self._head = None
        identity = self._told.meet(part.source, part.why)
        number = self._told.number(self.node, identity, part.medium) if part.runs else None
        if number is None:
            return
        try:
            runs = wire.unpack_runs(part.runs)
        except ValueError as error:
            self.spoilt(self._heard_at)
            raise PeerError(f"a run of hashes: {error}") from error
        self._index.store_all(number, runs)

    def _apply(self, batch: Brief) -> None:
        head = batch.head
        if head is not self._head:
            self._identity, self._head = self._told.meet(head.source, head.why), head
        for change in batch.changes:
            if isinstance(change, Kept):
                number = self._told.number(self.node, self._identity, change.medium)
                if number is not None:
                    self._index.store_all(number, wire.unpack_runs(change.runs))
                continue
            held = self._told.held(self._identity)
            if isinstance(change, Gone):
                if change.medium in held:
                    self._index.remove(held[change.medium], wire.unpack_hashes(change.hashes))
            else:
                for medium in held if change.medium is None else [change.medium]:
                    if medium in held:
                        self._index.clear(held[medium])

    def _drop_all(self) -> None:
        for number in self._told.numbers():
            self._index.clear(number)
        self._told.drop(self.node)
        self._head = None


def _weight(part: wire.SnapshotPart) -> int:
    """About how many bytes of memory it takes."""
    return sum([len(hashes) for _, hashes in part.runs]) + _RUN_BYTES * len(part.runs)
