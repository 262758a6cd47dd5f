"""Which slots of the segments are free, taken, being read, or next to be evicted. Pure: no clock, no I/O.

A *segment* belongs to one size class (bytes of a slot) or to none; a *slot* is an int, segment << 20 | position, and
in one of the states that sizeclass.py draws.

Always true: no slot that is being read is evicted or handed out; a slot is handed out only from FREE.

Which pages leave is decided in `victims` and `coldest` alone: of a class those of least density, and across classes a
whole segment whose slots are on average less dense than the page that would leave next. Density alone counts there: a
page of twice the bytes is of a model about twice as large, and saves about twice the computing.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvd.storage.nvme.ranking import Kinds, Ranking, Times
from kvd.storage.nvme.shares import Shares
from kvd.storage.nvme.sizeclass import (
    DOOMED,
    FREE,
    LEAVING,
    POSITION_BITS,
    RESERVED,
    USED,
    Names,
    Segment,
    SizeClass,
    Warmth,
)
from kvd.storage.quota import Share
from kvd.storage.tier import Name

_COUNT_MS: Final = 60_000
_POSITION: Final = (1 << POSITION_BITS) - 1


class Left(NamedTuple):
    """What a previous process left, one entry per slot."""

    state: npt.NDArray[np.uint8]  # FREE or USED
    names: Names
    kinds: Kinds
    used_at: Times


class Slots:
    """All segments. The caller holds a lock; nothing here waits."""

    def __init__(self, segments: int, shares: Mapping[str, Share] | None = None) -> None:
        self.shares = Shares(shares or {})
        self._segments: list[Segment | None] = [None] * segments
        self._classes: dict[int, SizeClass] = {}
        self._ranking = Ranking()
        self._now = self._count_at = 0

    def judge(self, ranking: Ranking) -> None:
        """This is what is known of which pages are worth keeping."""
        self._ranking = ranking
        for of_class in self._classes.values():
            of_class.forget()

    # -- segments ------------------------------------------------------------------------------------------

    def tick(self, now: int) -> None:
        """It is so many milliseconds since 1970."""
        self._now = now

    def unassigned(self) -> list[int]:
        """Segments that belong to no class."""
        return [number for number, segment in enumerate(self._segments) if segment is None]

    def assign(self, number: int, slot_bytes: int, slots: int) -> None:
        """Give a segment of no class to one."""
        assert self._segments[number] is None, "the segment belongs to a class"
        self._segments[number] = Segment.empty(slot_bytes, slots)
        of_class = self._classes.setdefault(slot_bytes, SizeClass())
        of_class.segments.append(number)
        of_class.roomy.add(number)

    def withdraw(self, number: int) -> None:
        """Take a segment, all of whose slots are free, from its class."""
        segment = self._segment(number)
        assert segment.free == len(segment.state), "the segment is in use"
        of_class = self._classes[segment.slot_bytes]
        of_class.segments.remove(number)
        of_class.roomy.discard(number)
        self._segments[number] = None
        of_class.forget()
        if not of_class.segments:
            del self._classes[segment.slot_bytes]

    def coldest(self, slot_bytes: int) -> int | None:
        """The segment another class should give to this one: idle, or colder than what this class evicts."""
        if self._classes.keys() <= {slot_bytes}:
            return None
        own = self._classes.get(slot_bytes)
        limit = own.floor if own is not None else (inf, 0)
        best: tuple[Warmth, int] | None = None
        for number, segment in enumerate(self._segments):
            if segment is None or segment.slot_bytes == slot_bytes:
                continue
            warmth = segment.warmth(self._ranking, self._now)
            if warmth < limit and (best is None or warmth < best[0]) and not segment.in_flight:
                best = warmth, number
        return None if best is None else best[1]

    def leave_all(self, number: int) -> list[int]:
        """Every page of a segment leaves: its slots, now LEAVING."""
        segment = self._segment(number)
        found = [position for position, state in enumerate(segment.state) if state == USED]
        for position in found:
            assert not segment.readers[position], "a slot that is being read"
            segment.state[position] = LEAVING
        return [number << POSITION_BITS | position for position in found]

    # -- slots ---------------------------------------------------------------------------------------------

    def free(self, slot_bytes: int) -> int:
        """Slots of the class that `take` would give."""
        of_class = self._classes.get(slot_bytes)
        return sum(self._segment(number).free for number in of_class.roomy) if of_class else 0

    def total(self, slot_bytes: int) -> int:
        of_class = self._classes.get(slot_bytes)
        return sum(len(self._segment(number).state) for number in of_class.segments) if of_class else 0

    def take(self, slot_bytes: int, count: int) -> list[int]:
        """Up to `count` free slots, now RESERVED."""
        found: list[int] = []
        of_class = self._classes.get(slot_bytes)
        while of_class and of_class.roomy and len(found) < count:
            number = min(of_class.roomy)
            segment = self._segment(number)
            position = -1
            while segment.free and len(found) < count:
                position = segment.state.index(FREE, position + 1)
                segment.state[position] = RESERVED
                segment.free -= 1
                found.append(number << POSITION_BITS | position)
            if not segment.free:
                of_class.roomy.discard(number)
        return found

    def fill(self, slot: int, name: Name, kind: int) -> None:
        """What was written to a reserved slot is committed."""
        segment, position = self._of(slot)
        assert segment.state[position] == RESERVED, "a slot that was not reserved"
        segment.state[position] = USED
        segment.names[position] = np.void(name)
        segment.use(position, kind, self._now)
        self.shares.came(name, segment.slot_bytes)

    def release(self, slots: Iterable[int]) -> None:
        """The pages are gone for good, or were never written; who still reads one keeps it from reuse."""
        for slot in slots:
            segment, position = self._of(slot)
            assert segment.state[position] not in (FREE, DOOMED), "released twice"
            if segment.readers[position]:
                segment.state[position] = DOOMED
            else:
                self._set_free(slot, segment, position)

    def keep(self, slots: Iterable[int]) -> None:
        """Pages that were LEAVING stay: their records could not be deleted."""
        for slot in slots:
            segment, position = self._of(slot)
            assert segment.state[position] == LEAVING, "the slot was not leaving"
            segment.state[position] = USED

    def pin(self, slot: int) -> bool:
        """Begin reading. False: the page is leaving or not quite there yet."""
        segment, position = self._of(slot)
        if segment.state[position] != USED or segment.readers[position] == 255:
            return False
        segment.readers[position] += 1
        segment.use(position, int(segment.kinds[position]), self._now)
        return True

    def unpin(self, slot: int) -> None:
        segment, position = self._of(slot)
        segment.readers[position] -= 1
        if not segment.readers[position] and segment.state[position] == DOOMED:
            self._set_free(slot, segment, position)

    def use(self, slot: int, kind: int) -> None:
        """Somebody cares for this page, which is of this kind from now on."""
        segment, position = self._of(slot)
        if segment.state[position] == USED:
            segment.use(position, kind, self._now)

    def victims(self, slot_bytes: int, count: int) -> list[int]:
        """Up to `count` pages of the class that leave next, now LEAVING."""
        of_class = self._classes.get(slot_bytes)
        return of_class.victims(self._segments, count, self._ranking, self.shares, self._now) if of_class else []

    def name(self, slot: int) -> Name:
        segment, position = self._of(slot)
        return bytes(segment.names[position])

    def unused_since(self, before: int, most: int) -> list[int]:
        """Up to `most` pages last used before then, now LEAVING."""
        found: list[int] = []
        for number, segment in enumerate(self._segments):
            if segment is not None and len(found) < most:
                idle = segment.idle()
                overdue = idle[segment.used_at[idle] < before][: most - len(found)].tolist()
                for position in overdue:
                    segment.state[position] = LEAVING
                found += [number << POSITION_BITS | position for position in overdue]
        return found

    def belongs(self, namespace: bytes, tenant: str) -> None:
        """The pages of this namespace are that tenant's."""
        self.shares.belongs(namespace, tenant)
        self._count_at = self._now
        for of_class in self._classes.values():
            of_class.forget()

    def held(self) -> dict[str, int]:
        """Bytes of each tenant that has a share. Asked for all the time, so all pages are looked at seldom."""
        if self.shares.active and self._now >= self._count_at:
            self._count_at = self._now + _COUNT_MS
            self.shares.count((s.names[s.held()], s.slot_bytes) for s in self._segments if s is not None)
        return {tenant: self.shares.held[tenant] for tenant in self.shares.of}

    def floor(self) -> float:
        """The density of the page that left last, of the class where it is least; 0 while there is room."""
        if self.unassigned() or not self._classes:
            return 0.0
        # A quarter may be free for the next put.
        roomy = any(3 * self.free(slot_bytes) > self.total(slot_bytes) for slot_bytes in self._classes)
        return 0.0 if roomy else min(of_class.floor[0] for of_class in self._classes.values())

    def restore(self, left: Left, starts: Sequence[int]) -> None:
        """All slots as they were left, segment after segment."""
        for number, (segment, start) in enumerate(zip(self._segments, starts, strict=True)):
            if segment is not None:
                part = slice(start, start + len(segment.state))
                segment.state[:] = left.state[part].tobytes()
                segment.names[:] = left.names[part]
                segment.kinds[:], segment.used_at[:] = left.kinds[part], left.used_at[part]
                segment.free = segment.state.count(FREE)
                if not segment.free:
                    self._classes[segment.slot_bytes].roomy.discard(number)

    # -- what there is -------------------------------------------------------------------------------------

    def segments(self) -> Sequence[Segment | None]:
        return self._segments

    @property
    def used_bytes(self) -> int:
        return sum((len(s.state) - s.free) * s.slot_bytes for s in self._segments if s is not None)

    def faults(self, owned: set[int]) -> list[str]:
        """Broken invariants, in words, while nothing is in flight. `owned`: the slots that the catalog knows."""
        found: list[str] = []
        held: set[int] = set()
        for number, segment in enumerate(self._segments):
            if segment is None:
                continue
            held |= {number << POSITION_BITS | at for at, state in enumerate(segment.state) if state == USED}
            if segment.free != segment.state.count(FREE):
                found.append(f"segment {number} counts {segment.free} free slots")
            if (number in self._classes[segment.slot_bytes].roomy) != bool(segment.free):
                found.append(f"segment {number} is {'' if segment.free else 'not '}roomy")
            if segment.in_flight:
                found.append(f"segment {number} has slots in flight")
        found += [f"slot {slot:#x} is held and in no record" for slot in held - owned]
        found += [f"slot {slot:#x} is in a record and not held" for slot in owned - held]
        return found

    def _set_free(self, slot: int, segment: Segment, position: int) -> None:
        segment.state[position] = FREE
        segment.free += 1
        self._classes[segment.slot_bytes].roomy.add(slot >> POSITION_BITS)

    def _of(self, slot: int) -> tuple[Segment, int]:
        return self._segment(slot >> POSITION_BITS), slot & _POSITION

    def _segment(self, number: int) -> Segment:
        segment = self._segments[number]
        assert segment is not None, "a segment of no class"
        return segment
