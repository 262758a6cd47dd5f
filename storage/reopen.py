"""From the records of a catalog to the slots they fill, 10**6 of them well within a second. Pure but for its input.

Only the fixed parts of records are looked at, as arrays; seals and checksums are compared when a page is asked for.
A record is void when its segment is not there or of another class, when its position is beyond the segment's end, or
when another record claims the same slot (of two such, one is damaged, and which one is not known here).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvd.storage.catalog import Heads
from kvd.storage.segments import ALIGN
from kvd.storage.slots import POSITION_BITS, Names, Numbers, Slots
from kvd.storage.tier import NAME_BYTES, Name


class There(NamedTuple):
    """What a tier begins with."""

    slots: Numbers  # ascending
    names: Names  # of the same order
    void: list[Name]
    sequence: int  # the highest


def taken_over(pieces: Iterable[Heads], slots: Slots) -> There:
    """`slots` knows the segments that are there, and no page yet."""
    segments = slots.segments()
    classes = np.array([segment.slot_bytes if segment else 0 for segment in segments], np.int64)
    counts = np.array([len(segment.state) if segment else 0 for segment in segments], np.int64)
    places, names = [np.zeros(0, np.int64)], [np.zeros(0, f"V{NAME_BYTES}")]
    void: list[Name] = []
    sequence = 0
    for piece in pieces:
        good = _plausible(piece.heads, classes, counts)
        places.append(piece.heads["slot"][good].astype(np.int64))
        names.append(piece.names[good])
        void += [name.tobytes() for name in piece.names[~good]] + piece.odd
        sequence = max(sequence, int(piece.heads["sequence"][good].max(initial=0)))
    return _alone(np.concatenate(places), np.concatenate(names), void, sequence)


def _plausible(heads: npt.NDArray[np.void], classes: Numbers, counts: Numbers) -> npt.NDArray[np.bool_]:
    number = heads["slot"] >> POSITION_BITS
    known = number < len(classes)
    number = np.where(known, number, 0).astype(np.int64)
    position = (heads["slot"] & (1 << POSITION_BITS) - 1).astype(np.int64)
    length = heads["length"].astype(np.int64)
    slot_bytes = -(-length // ALIGN) * ALIGN * heads["shards"]
    good: npt.NDArray[np.bool_] = (
        known & (slot_bytes > 0) & (slot_bytes == classes[number]) & (position < counts[number])
    )
    return good


def _alone(places: Numbers, names: Names, void: list[Name], sequence: int) -> There:
    order = np.argsort(places)
    places, names = places[order], names[order]
    same = np.diff(places) == 0
    twice = np.concatenate([[False], same]) | np.concatenate([same, [False]]) if len(places) else same
    if twice.any():
        void = void + [name.tobytes() for name in names[twice]]
        places, names = places[~twice], names[~twice]
    return There(places, names, void, sequence)
