"""One size class: the slots of its segments, and which of them leave next. Pure.

A slot is FREE -> RESERVED (being written) -> USED -> LEAVING (its record is being deleted) -> FREE, or DOOMED in
between while somebody still reads it. What is known of a slot lies in arrays, 59 bytes in all, so that searching is
memchr and ranking is numpy.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

import numpy as np
import numpy.typing as npt

from kvd.storage.nvme.ranking import Kinds, Numbers, Ranking, Times
from kvd.storage.nvme.shares import Shares
from kvd.storage.tier import NAME_BYTES
from kvd.storage.worth import PINNED

POSITION_BITS: Final = 20  # a slot is an int, segment << 20 | position
FREE, RESERVED, USED, LEAVING, DOOMED = range(5)
_WARM_MS: Final = 10_000  # an untouched segment cools slowly
_EARLIER: Final = 1 << 62  # than any order
_AHEAD: Final = 64  # this part of all is ranked ahead: in small tiers nobody

Names = npt.NDArray[np.void]


Warmth = tuple[float, int]  # density, and when it was used: the later of two equals is warmer


@dataclass(slots=True)
class Segment:
    """One segment file's slots."""

    slot_bytes: int
    state: bytearray
    readers: bytearray
    names: Names
    kinds: Kinds
    used_at: Times
    free: int
    _warmth: tuple[int, Warmth] | None = None  # when it was worked out

    @classmethod
    def empty(cls, slot_bytes: int, slots: int) -> "Segment":
        names = np.zeros(slots, f"V{NAME_BYTES}")
        kinds, used_at = np.zeros(slots, np.uint8), np.zeros(slots, np.int64)
        return cls(slot_bytes, bytearray(slots), bytearray(slots), names, kinds, used_at, slots)

    @property
    def in_flight(self) -> bool:
        """Some slot is being read or written, or is on its way out."""
        read = self.readers.count(0) != len(self.readers)
        return read or any(state in self.state for state in (RESERVED, LEAVING, DOOMED))

    def held(self) -> Numbers:
        """Positions of all pages."""
        return np.flatnonzero(np.frombuffer(self.state, np.uint8) == USED)

    def idle(self) -> Numbers:
        """Positions of the pages that nobody reads and nobody has pinned."""
        state, readers = np.frombuffer(self.state, np.uint8), np.frombuffer(self.readers, np.uint8)
        return np.flatnonzero((state == USED) & (readers == 0) & (self.kinds != PINNED))

    def warmth(self, ranking: Ranking, now: int) -> Warmth:
        """The density of its slots on average, where a free one has none, and the latest use."""
        if self._warmth is not None and now - self._warmth[0] < _WARM_MS:
            return self._warmth[1]
        held = self.held()
        if (self.kinds[held] == PINNED).any():
            return inf, 0
        density = ranking.density(self.kinds[held], self.used_at[held], now).sum() / max(1, len(self.state))
        found = _warmth(density, int(self.used_at[held].max(initial=0)))
        self._warmth = now, found
        return found

    def use(self, position: int, kind: int, now: int) -> None:
        """Its page was used, or has come."""
        self.kinds[position], self.used_at[position] = kind, now
        self._warmth = None


@dataclass(slots=True)
class SizeClass:
    """The segments of one size class, and who leaves next of them."""

    segments: list[int] = field(default_factory=list)
    roomy: set[int] = field(default_factory=set)  # those with free slots
    floor: Warmth = (0.0, 0)  # of the page that left last
    _next: deque[tuple[int, int, float]] = field(default_factory=deque)  # ranked slots, when used, their density

    def victims(
        self, all_segments: Sequence[Segment | None], count: int, ranking: Ranking, shares: Shares, now: int
    ) -> list[int]:
        """Up to `count` pages that leave next, now LEAVING."""
        found: list[int] = []
        while len(found) < count and (self._next or self._rank(all_segments, count, ranking, shares, now)):
            slot, used_at, density = self._next.popleft()
            number, position = slot >> POSITION_BITS, slot & (1 << POSITION_BITS) - 1
            segment = all_segments[number] if number in self.segments else None
            if segment is None or segment.state[position] != USED or segment.readers[position]:
                continue
            if segment.kinds[position] == PINNED or segment.used_at[position] != used_at:
                continue  # it was pinned, or used, since it was ranked
            if shares.leaves(bytes(segment.names[position]), segment.slot_bytes):
                segment.state[position] = LEAVING
                self.floor = _warmth(density, used_at)
                found.append(slot)
        return found

    def forget(self) -> None:
        """What was ranked is not so any more."""
        self._next.clear()

    def _rank(
        self, all_segments: Sequence[Segment | None], count: int, ranking: Ranking, shares: Shares, now: int
    ) -> bool:
        """Some that leave next, more than are asked for, because looking at all is the dear part; False: none."""
        if shares.active:
            shares.count((s.names[s.held()], s.slot_bytes) for s in all_segments if s is not None)
        slots: list[Numbers] = []
        orders: list[Numbers] = []
        for number in self.segments:
            segment = all_segments[number]
            assert segment is not None, "a segment of no class"
            idle = segment.idle()
            order = ranking.order(segment.kinds[idle], segment.used_at[idle], now)
            if shares.active:
                first, stay = shares.sorted(segment.names[idle], segment.slot_bytes)
                order[first] -= _EARLIER
                idle, order = idle[~stay], order[~stay]
            slots.append(idle | number << POSITION_BITS)
            orders.append(order)
        if not any(map(len, slots)):
            return False
        slot, order = np.concatenate(slots), np.concatenate(orders)
        most = min(len(slot), max(count, len(slot) // _AHEAD))
        least = np.argpartition(order, most - 1)[:most]
        for one in slot[least[np.argsort(order[least])]].tolist():
            segment, position = all_segments[one >> POSITION_BITS], one & (1 << POSITION_BITS) - 1
            assert segment is not None, "a segment of no class"
            kind, used_at = segment.kinds[position : position + 1], segment.used_at[position : position + 1]
            self._next.append((one, int(used_at[0]), float(ranking.density(kind, used_at, now)[0])))
        return True


def _warmth(density: float, used_at: int) -> Warmth:
    """Rounded, for an average of equal densities is not exactly the density."""
    return float(np.float32(density)), used_at
