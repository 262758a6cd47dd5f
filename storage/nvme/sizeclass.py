"""One size class: the slots of its segments, and the hand that goes round them to say who leaves. Pure.

A slot is FREE -> RESERVED (being written) -> USED <-> TOUCHED (read since the hand passed) -> LEAVING (its record is
being deleted) -> FREE, or DOOMED in between while somebody still reads it. State is a byte a slot and the name 48, so
searching is memchr and 10**6 pages are 50 MB.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvd.storage.tier import NAME_BYTES

POSITION_BITS: Final = 20  # a slot is an int, segment << 20 | position
FREE, RESERVED, USED, TOUCHED, LEAVING, DOOMED = range(6)
HELD: Final = (USED, TOUCHED)
_SPARED: Final = bytes(USED if state == TOUCHED else state for state in range(256))  # the hand takes the chance away

Names = npt.NDArray[np.void]
Numbers = npt.NDArray[np.int64]


@dataclass(slots=True)
class Segment:
    """One segment file's slots."""

    slot_bytes: int
    state: bytearray
    readers: bytearray
    names: Names
    free: int
    used_at: int  # the clock when a page of it was last read or written

    @classmethod
    def empty(cls, slot_bytes: int, slots: int, now: int) -> "Segment":
        return cls(slot_bytes, bytearray(slots), bytearray(slots), np.zeros(slots, f"V{NAME_BYTES}"), slots, now)

    @property
    def in_flight(self) -> bool:
        """Some slot is being read or written, or is on its way out."""
        read = self.readers.count(0) != len(self.readers)
        return read or any(state in self.state for state in (RESERVED, LEAVING, DOOMED))


@dataclass(slots=True)
class SizeClass:
    """The segments of one size class, and the hand that goes round them."""

    segments: list[int] = field(default_factory=list)
    roomy: set[int] = field(default_factory=set)  # those with free slots
    at: int = 0
    position: int = 0
    since: int = 0  # the clock when the hand began its round

    def victims(self, all_segments: Sequence[Segment | None], count: int, now: int) -> list[int]:
        """Up to `count` pages that leave next, now LEAVING: second chance."""
        found: list[int] = []
        for _ in range(2 * len(self.segments) + 1):  # once round to take chances away, once more to use that
            number = self.segments[self.at]
            segment = all_segments[number]
            assert segment is not None, "a segment of no class"
            while len(found) < count:
                position = segment.state.find(USED, self.position)
                passed = slice(self.position, position if position >= 0 else None)
                segment.state[passed] = segment.state[passed].translate(_SPARED)
                if position < 0:
                    break
                self.position = position + 1
                if not segment.readers[position]:
                    segment.state[position] = LEAVING
                    found.append(number << POSITION_BITS | position)
            if len(found) == count:
                break
            self.position, self.at = 0, (self.at + 1) % len(self.segments)
            if self.at == 0:
                self.since = now
        return found
