"""Which slots of the segments are free, taken, being read, or next to be evicted. Pure: no clock, no I/O.

A *segment* belongs to one size class (bytes of a slot) or to none; a *slot* is an int, segment << 20 | position, and
in one of the states that sizeclass.py draws.

Always true: no slot that is being read is evicted or handed out; a slot is handed out only from FREE.

Which pages leave is decided in `victims` and `coldest` alone: second chance within a class, and across classes a whole
segment that nobody used since the hand of the class in need last came round, for that is colder than what it keeps.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvd.storage.nvme.sizeclass import (
    DOOMED,
    FREE,
    HELD,
    LEAVING,
    POSITION_BITS,
    RESERVED,
    TOUCHED,
    USED,
    Names,
    Segment,
    SizeClass,
)
from kvd.storage.tier import Name

_POSITION: Final = (1 << POSITION_BITS) - 1


class Slots:
    """All segments. The caller holds a lock; nothing here waits."""

    def __init__(self, segments: int) -> None:
        self._segments: list[Segment | None] = [None] * segments
        self._classes: dict[int, SizeClass] = {}
        self._clock = 0

    # -- segments ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """A batch was written: the unit in which `coldest` counts time."""
        self._clock += 1

    def unassigned(self) -> list[int]:
        """Segments that belong to no class."""
        return [number for number, segment in enumerate(self._segments) if segment is None]

    def assign(self, number: int, slot_bytes: int, slots: int) -> None:
        """Give a segment of no class to one."""
        assert self._segments[number] is None, "the segment belongs to a class"
        self._segments[number] = Segment.empty(slot_bytes, slots, self._clock)
        of_class = self._classes.setdefault(slot_bytes, SizeClass(since=self._clock))
        of_class.segments.append(number)
        of_class.roomy.add(number)

    def withdraw(self, number: int) -> None:
        """Take a segment, all of whose slots are free, from its class."""
        segment = self._segment(number)
        assert segment.free == len(segment.state), "the segment is in use"
        of_class = self._classes[segment.slot_bytes]
        if of_class.segments.index(number) < of_class.at:
            of_class.at -= 1
        of_class.segments.remove(number)
        of_class.roomy.discard(number)
        self._segments[number] = None
        if of_class.segments:
            of_class.at %= len(of_class.segments)
        else:
            del self._classes[segment.slot_bytes]

    def coldest(self, slot_bytes: int) -> int | None:
        """The segment another class should give to this one: idle, or colder than what this class evicts."""
        if self._classes.keys() <= {slot_bytes}:
            return None
        own = self._classes.get(slot_bytes)
        since = own.since if own is not None else self._clock + 1
        best: tuple[int, int] | None = None
        for number, segment in enumerate(self._segments):
            if segment is None or segment.slot_bytes == slot_bytes:
                continue
            age = -1 if segment.free == len(segment.state) else segment.used_at
            if age < since and (best is None or age < best[0]) and not segment.in_flight:
                best = age, number
        return None if best is None else best[1]

    def leave_all(self, number: int) -> list[int]:
        """Every page of a segment leaves: its slots, now LEAVING."""
        segment = self._segment(number)
        found = [position for position, state in enumerate(segment.state) if state in HELD]
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

    def fill(self, slot: int, name: Name) -> None:
        """What was written to a reserved slot is committed."""
        segment, position = self._of(slot)
        assert segment.state[position] == RESERVED, "a slot that was not reserved"
        segment.state[position] = USED
        segment.names[position] = np.void(name)
        segment.used_at = self._clock

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
        if segment.state[position] not in HELD or segment.readers[position] == 255:
            return False
        segment.readers[position] += 1
        segment.state[position] = TOUCHED
        segment.used_at = self._clock
        return True

    def unpin(self, slot: int) -> None:
        segment, position = self._of(slot)
        segment.readers[position] -= 1
        if not segment.readers[position] and segment.state[position] == DOOMED:
            self._set_free(slot, segment, position)

    def touch(self, slot: int) -> None:
        """Somebody cares for this page."""
        segment, position = self._of(slot)
        if segment.state[position] == USED:
            segment.state[position] = TOUCHED

    def victims(self, slot_bytes: int, count: int) -> list[int]:
        """Up to `count` pages of the class that leave next, now LEAVING."""
        of_class = self._classes.get(slot_bytes)
        return of_class.victims(self._segments, count, self._clock) if of_class else []

    def name(self, slot: int) -> Name:
        segment, position = self._of(slot)
        return bytes(segment.names[position])

    def restore(self, state: npt.NDArray[np.uint8], names: Names, starts: Sequence[int]) -> None:
        """All slots as they were left: their states, FREE or USED, and names, segment after segment."""
        for number, (segment, start) in enumerate(zip(self._segments, starts, strict=True)):
            if segment is not None:
                part = slice(start, start + len(segment.state))
                segment.state[:] = state[part].tobytes()
                segment.names[:] = names[part]
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
            held |= {number << POSITION_BITS | at for at, state in enumerate(segment.state) if state in HELD}
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
