"""A batch of a node's stream in short: what an index needs of it, without tokens, which are most of its bytes. Pure.

It lies in the batch's first frame, behind the topic: to ZeroMQ a topic is how a message begins, so who reads the batch
itself, as SGLang's clients do, never looks at it, and who reads this never looks at the batch.

    "kvd" [head, [change, ...]]                          msgpack; the head is encoded by itself, as bytes: most batches
                                                         bear the same one, which is then decoded once
    change   [0, medium, [[parent | nil, hashes], ...]]  stored: runs, as in snapshots (kvd.wire.stream)
             [1, medium, hashes]                         removed, in any order
             [2, medium | nil]                           nothing is held any more, of that medium or at all

SGLang says one event for each block: those that go on where the one before ended are one run here.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

import msgspec

from kvd.errors import UNDECODABLE, PeerError
from kvd.sglang_events import GPU, MAX_BATCH_BYTES, AnyEvent, Cleared, Removed, Stored, encode, read_frames
from kvd.wire.stream import TOPIC, Head, Run, pack_hashes

_HEADS: Final = 1024  # that are remembered as bytes and decoded
_HASH_BYTES: Final = 8
_OBJECT_BYTES: Final = 160  # of memory, about, that a change or a run takes besides its bytes
_OWN: Final = 10  # as much as so many of them, a batch with its head


class Kept(msgspec.Struct, array_like=True, tag=0, frozen=True, gc=False):
    medium: str
    runs: list[Run]


class Gone(msgspec.Struct, array_like=True, tag=1, frozen=True, gc=False):
    medium: str
    hashes: bytes


class Emptied(msgspec.Struct, array_like=True, tag=2, frozen=True, gc=False):
    medium: str | None


Change = Kept | Gone | Emptied


class Brief(NamedTuple):
    """All changes are of the head's source. Batches that bear the same head share one object."""

    head: Head
    changes: Sequence[Change]
    encoded: int  # bytes of its frame

    @property
    def weight(self) -> int:
        """About how many bytes of memory it takes: small changes take far more than they have bytes."""
        return self.encoded + _OBJECT_BYTES * (_OWN + sum([1 + len(_hashes(change)) for change in self.changes]))


class _Packed(msgspec.Struct, array_like=True, gc=False):
    head: bytes
    changes: list[Change]


_packed = msgspec.msgpack.Decoder(_Packed).decode
_head = msgspec.msgpack.Decoder(Head).decode


def first_frame(head: Head, events: Iterable[AnyEvent]) -> bytes:
    """Topic and brief of a batch. Its hashes are signed 64-bit numbers."""
    return TOPIC + encode(_Packed(encode(head), list(_changes(events))))


class Briefs:
    """Reads them. Remembers heads, some."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}

    def read(self, frames: Sequence[bytes]) -> tuple[int, Brief] | None:
        """Number and brief of a message, published or replayed; None where it ends a replay. Raises PeerError."""
        message = read_frames(frames)
        if message is None:
            return None
        first = frames[-3] if len(frames) > 2 else b""
        if len(first) <= len(TOPIC) or len(first) > MAX_BATCH_BYTES:
            raise PeerError("a batch without kvd's brief", "is this endpoint a worker's own publisher?")
        try:
            packed = _packed(first[len(TOPIC) :])
            head = self._heads.get(packed.head) or self._remember(packed.head)
        except UNDECODABLE as error:
            raise PeerError(f"not a brief of a batch: {error}") from error
        for change in packed.changes:
            if any([len(hashes) % _HASH_BYTES for hashes in _hashes(change)]):
                raise PeerError("a hash of another length than 8 bytes")
        return message[0], Brief(head, packed.changes, len(first))

    def _remember(self, raw: bytes) -> Head:
        if len(self._heads) >= _HEADS:
            self._heads.clear()
        found = self._heads[raw] = _head(raw)
        return found


def _hashes(change: Change) -> list[bytes]:
    if isinstance(change, Kept):
        return [hashes for _, hashes in change.runs]
    return [change.hashes] if isinstance(change, Gone) else []


def _changes(events: Iterable[AnyEvent]) -> Iterator[Change]:
    telling = (event for event in events if isinstance(event, Cleared) or event.block_hashes)
    for (kind, medium), alike in groupby(telling, lambda event: (type(event), event.medium)):
        if kind is Cleared:
            yield Emptied(medium)
        elif kind is Removed:
            gone = [value for event in alike if isinstance(event, Removed) for value in event.block_hashes]
            yield Gone(medium or GPU, pack_hashes(gone))
        else:
            yield Kept(medium or GPU, _runs(event for event in alike if isinstance(event, Stored)))


def _runs(events: Iterable[Stored]) -> list[Run]:
    runs: list[tuple[int | None, list[int]]] = []
    for event in events:
        if runs and runs[-1][1][-1] == event.parent_block_hash:
            runs[-1][1].extend(event.block_hashes)
        else:
            runs.append((event.parent_block_hash, list(event.block_hashes)))
    return [(parent, pack_hashes(hashes)) for parent, hashes in runs]
