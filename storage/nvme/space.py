"""Free slots for what comes: from new segments, from other size classes, by evicting.

What a disk that is full refuses is not asked of it again for RETRY_S; the tier works with the segments it has.
All of it is called while `ledger.writing` is held.
"""

import errno
import time
from collections.abc import Sequence
from typing import Final

from kvd.storage.nvme.health import Health
from kvd.storage.nvme.ledger import Ledger
from kvd.storage.nvme.segments import Segments

RETRY_S: Final = 30.0  # how long a disk that was full is believed to be


class Space:
    """Where new pages are put, and which pages leave for them."""

    def __init__(self, segments: Segments, ledger: Ledger, health: Health) -> None:
        self.full = False  # the disk, when a segment was last to be made
        self._full_until = 0.0
        self._segments = segments
        self._ledger = ledger
        self._health = health
        self._reserve: dict[int, int] = {}  # slots to keep free, by size class

    def take(self, slot_bytes: int, count: int) -> list[int]:
        """Up to `count` slots, now RESERVED."""
        self._make_room(slot_bytes, count)
        with self._ledger.state:
            slots = self._ledger.slots.take(slot_bytes, count)
        self._reserve[slot_bytes] = max(count, self._reserve.get(slot_bytes, 0) * 7 // 8)
        if len(slots) < count:
            self._health.counters["no_room"] += count - len(slots)
        return slots

    def refill(self, classes: set[int], not_these: Sequence[int]) -> list[int]:
        """Victims that leave a class enough free slots for the next put, without a commit of its own then."""
        victims: list[int] = []
        slots = self._ledger.slots
        with self._ledger.state:
            growing = not self.full and bool(slots.unassigned())
            for slot_bytes in classes:
                wanted = min(self._reserve[slot_bytes], slots.total(slot_bytes) // 4)
                missing = wanted - slots.free(slot_bytes)
                if missing > 0 and not growing and slots.coldest(slot_bytes) is None:
                    chosen = slots.victims(slot_bytes, missing)
                    slots.keep(slot for slot in chosen if slot in not_these)
                    victims += [slot for slot in chosen if slot not in not_these]
        return victims

    def _make_room(self, slot_bytes: int, count: int) -> None:
        """Have `count` free slots of a class: from new segments, from other classes, by evicting its own pages."""
        while (missing := count - self._free(slot_bytes)) > 0:
            if self._add_segment(slot_bytes) or self._take_over(slot_bytes):
                continue
            with self._ledger.state:
                victims = self._ledger.slots.victims(slot_bytes, missing)
            if not victims or not self._ledger.evict(victims):
                return

    def _free(self, slot_bytes: int) -> int:
        with self._ledger.state:
            return self._ledger.slots.free(slot_bytes)

    def _add_segment(self, slot_bytes: int) -> bool:
        """A segment that belongs to no class, made now where there is no file yet."""
        with self._ledger.state:
            unassigned = self._ledger.slots.unassigned()
        for number in sorted(unassigned, key=lambda number: number not in self._segments):
            made = number in self._segments
            if not made and self.full and time.monotonic() < self._full_until:
                return False
            try:
                (self._segments.assign if made else self._segments.create)(number, slot_bytes)
            except OSError as why:
                full = why.errno in (errno.ENOSPC, errno.EDQUOT)
                self._health.counters["disk_full" if full else "io_error"] += 1
                self.full, self._full_until = True, time.monotonic() + RETRY_S
                return False
            self.full = False
            with self._ledger.state:
                self._ledger.slots.assign(number, slot_bytes, self._segments.slots_of(slot_bytes))
            return True
        return False

    def _take_over(self, slot_bytes: int) -> bool:
        """A segment of another class, without its pages."""
        slots = self._ledger.slots
        with self._ledger.state:
            number = slots.coldest(slot_bytes)
            victims = slots.leave_all(number) if number is not None else []
        if number is None:
            return False
        if not self._ledger.evict(victims):
            return False
        with self._ledger.state:
            slots.withdraw(number)
        return self._add_segment(slot_bytes)
