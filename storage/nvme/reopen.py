"""From the records of a catalog to the slots they fill, 10**6 of them well within a second. Pure but for its input.

Only the fixed parts of records are looked at, as arrays; seals and checksums are compared when a page is asked for.
A record is void when its segment is not there or of another class, when its position is beyond the segment's end, or
when another record claims the same slot (of two such, one is damaged, and which one is not known here).
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvd.storage.nvme.catalog import Heads
from kvd.storage.nvme.ranking import Numbers
from kvd.storage.nvme.segments import ALIGN
from kvd.storage.nvme.sizeclass import FREE, POSITION_BITS, USED
from kvd.storage.nvme.slots import Left, Slots
from kvd.storage.tier import NAME_BYTES, Name
from kvd.storage.worth import PINNED, UNKNOWN


class Taken(NamedTuple):
    """What is not in the slots."""

    void: list[Name]
    sequence: int  # the highest


class Shape(NamedTuple):
    """The segments, as arrays by their number."""

    classes: Numbers  # bytes of a slot, 0: of no class
    slots: Numbers
    starts: Numbers  # where a segment's slots begin among all

    @classmethod
    def of(cls, slots: Slots) -> "Shape":
        segments = slots.segments()
        counts = np.array([len(segment.state) if segment else 0 for segment in segments], np.int64)
        classes = np.array([segment.slot_bytes if segment else 0 for segment in segments], np.int64)
        return cls(classes, counts, np.cumsum(counts) - counts)


def take_over(pieces: Callable[[], Iterable[Heads]], slots: Slots) -> Taken:
    """Fill `slots`, which know the segments that are there and no page yet. A second pass where two claim a slot."""
    shape = Shape.of(slots)
    total = int(shape.slots.sum())
    state, owner, names = np.full(total, FREE, np.uint8), np.zeros(total, np.int32), np.zeros(total, f"V{NAME_BYTES}")
    kinds, used_at = np.zeros(total, np.uint8), np.zeros(total, np.int64)
    void: list[Name] = []
    claimed = [np.zeros(0, np.int64)]
    sequence = 0
    for piece in _gathered(pieces()):
        good, at = _places(piece.heads, shape)
        void += [name.tobytes() for name in piece.names[~good]] + piece.odd
        sequence = max(sequence, int(piece.heads["sequence"][good].max(initial=0)))
        mine = np.arange(len(at), dtype=np.int32)
        owner[at] = mine
        claimed.append(at[(state[at] != FREE) | (owner[at] != mine)])
        state[at], names[at] = USED, piece.names if good.all() else piece.names[good]
        kinds[at], used_at[at] = piece.heads["kind"][good], piece.heads["stored"][good].astype(np.int64) * 1000
    twice = np.concatenate(claimed)
    if len(twice):
        state[twice] = FREE
        for piece in pieces():
            good, at = _places(piece.heads, shape)
            void += [name.tobytes() for name in piece.names[good][np.isin(at, twice)]]
    kinds[kinds == PINNED] = UNKNOWN  # who is still pinned, the daemon says
    slots.restore(Left(state, names, kinds, used_at), shape.starts.tolist())
    return Taken(void, sequence)


def _gathered(pieces: Iterable[Heads]) -> Iterator[Heads]:
    """Larger pieces: numpy's calls have a price each."""
    rest = iter(pieces)
    while some := list(islice(rest, 64)):
        names, heads = np.concatenate([piece.names for piece in some]), np.concatenate([piece.heads for piece in some])
        yield Heads(names, heads, [name for piece in some for name in piece.odd])


def _places(heads: npt.NDArray[np.void], shape: Shape) -> tuple[npt.NDArray[np.bool_], Numbers]:
    """Which records can be, and where among all slots those are."""
    number = heads["slot"] >> POSITION_BITS
    known = number < len(shape.classes)
    number = np.where(known, number, 0).astype(np.int64)
    position = (heads["slot"] & (1 << POSITION_BITS) - 1).astype(np.int64)
    slot_bytes = -(-heads["length"].astype(np.int64) // ALIGN) * ALIGN * heads["shards"]
    good = known & (slot_bytes > 0) & (slot_bytes == shape.classes[number]) & (position < shape.slots[number])
    return good, (shape.starts[number] + position)[good]
