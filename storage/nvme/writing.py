"""A put, step by step: what is new, slots for it, payloads and barrier, and the commit that makes it so.

One put at a time: the caller holds `ledger.writing`. Whatever fails on the way, the slots of pages that did not become
durable are free again.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvd.storage.failpoints import reach
from kvd.storage.nvme.catalog import Record
from kvd.storage.nvme.health import Health
from kvd.storage.nvme.ledger import Ledger
from kvd.storage.nvme.segments import Segments, fits, slot_bytes_of
from kvd.storage.nvme.space import Space
from kvd.storage.nvme.transfers import Transfers
from kvd.storage.tier import Buffers, Name, Page

Pages = Sequence[tuple[Page, Buffers]]


class Entry(NamedTuple):
    """A page on its way in."""

    page: Page
    buffers: Buffers
    slot: int


class Sorted(NamedTuple):
    """What is to be done with the pages of a put."""

    held: set[int]  # where in the list those are that are held already
    fresh: dict[Name, int]  # where the new ones are
    replaced: dict[Name, Record]  # what is held under a new one's name, of other sizes


class Writing:
    """Puts pages into a tier."""

    def __init__(self, segments: Segments, ledger: Ledger, space: Space, transfers: Transfers, health: Health) -> None:
        self._segments = segments
        self._ledger = ledger
        self._space = space
        self._transfers = transfers
        self._health = health

    def put(self, pages: Pages) -> list[bool]:
        held, fresh, replaced = self._sort(pages)
        self._ledger.tick()
        entries = self._place(pages, fresh)
        durable: set[int] = set()
        try:
            reach("nvme.put.placed")
            durable = self._transfers.write([(entry.slot, entry.buffers) for entry in entries])
        finally:
            with self._ledger.state:
                self._ledger.slots.release(entry.slot for entry in entries if entry.slot not in durable)
        written = [entry for entry in entries if entry.slot in durable]
        stored = {entry.page.name for entry in written} if written and self._publish(written, replaced) else set()
        self._health.judge(len(entries) - len(durable), len(entries), "write_error")
        return [
            at in held or (page.name in stored and fits(page, buffers)) for at, (page, buffers) in enumerate(pages)
        ]

    def _sort(self, pages: Pages) -> Sorted:
        found = Sorted(set(), {}, {})
        records = self._ledger.records([page.name for page, _ in pages])
        for at, ((page, buffers), record) in enumerate(zip(pages, records, strict=True)):
            if not fits(page, buffers) or not self._segments.slots_of(slot_bytes_of(page)):
                self._health.counters["wrong_size"] += 1
                continue
            if record and (record.page.length, record.page.shards) == (page.length, page.shards):
                found.held.add(at)
                self._ledger.touch(record, page.kind)
                continue
            found.fresh.setdefault(page.name, at)
            if record:
                found.replaced[page.name] = record
        return found

    def _place(self, pages: Pages, fresh: dict[Name, int]) -> list[Entry]:
        """Slots for the new pages, as far as there is room."""
        by_class: dict[int, list[int]] = {}
        for at in fresh.values():
            by_class.setdefault(slot_bytes_of(pages[at][0]), []).append(at)
        entries: list[Entry] = []
        for slot_bytes, positions in by_class.items():
            slots = self._space.take(slot_bytes, len(positions))
            entries += [Entry(*pages[at], slot) for at, slot in zip(positions, slots, strict=False)]
        return entries

    def _publish(self, entries: Sequence[Entry], replaced: dict[Name, Record]) -> bool:
        """False: the disk is too full for the commit, and nothing changed."""
        old = [replaced[entry.page.name].slot for entry in entries if entry.page.name in replaced]
        victims = self._space.refill({slot_bytes_of(entry.page) for entry in entries}, old)
        return self._ledger.publish([(entry.slot, entry.page) for entry in entries], old, victims)
