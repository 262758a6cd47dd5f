"""A put, step by step: what is new, slots for it, payloads and barrier, and the commit that makes it so.

One put at a time: the caller holds `ledger.writing`. Whatever fails on the way, the slots of pages that did not become
durable are free again.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

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
    replaced: set[Name]  # new ones under whose name something of other sizes is held


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
        if failed := len(entries) - len(durable):
            self._health.counters["write_error"] += failed
        self._health.judge(failed, len(entries))
        still = self._still_there(pages, held)
        return [
            at in still or (page.name in stored and fits(page, buffers)) for at, (page, buffers) in enumerate(pages)
        ]

    def _sort(self, pages: Pages) -> Sorted:
        found = Sorted(set(), {}, set())
        records = self._ledger.records([page.name for page, _ in pages])
        for at, ((page, buffers), record) in enumerate(zip(pages, records, strict=True)):
            if not fits(page, buffers) or not self._segments.slots_of(slot_bytes_of(page)):
                self._health.counters["wrong_size"] += 1
                continue
            if _is(record, page):
                found.held.add(at)
                self._ledger.touch(record, page.kind)
                continue
            found.fresh.setdefault(page.name, at)
            if record:
                found.replaced.add(page.name)
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

    def _publish(self, entries: Sequence[Entry], replaced: set[Name]) -> bool:
        """False: the disk is too full for the commit, and nothing changed."""
        # Looked up now: what was to be replaced may have left for these very entries, which may lie in its slot.
        records = self._ledger.records([entry.page.name for entry in entries if entry.page.name in replaced])
        old = [record.slot for record in records if record]
        victims = self._space.refill({slot_bytes_of(entry.page) for entry in entries}, old)
        return self._ledger.publish([(entry.slot, entry.page) for entry in entries], old, victims)

    def _still_there(self, pages: Pages, held: set[int]) -> set[int]:
        """Of the pages that were held: some may have left to make room for the others."""
        asked = sorted(held)
        records = self._ledger.records([pages[at][0].name for at in asked])
        return {at for at, record in zip(asked, records, strict=True) if _is(record, pages[at][0])}


def _is(record: Record | None, page: Page) -> TypeGuard[Record]:
    """What is held is of the page's sizes."""
    return record is not None and (record.page.length, record.page.shards) == (page.length, page.shards)
