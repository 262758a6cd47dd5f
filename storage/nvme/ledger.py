"""What is held: the catalog on the disk and the slots in memory, changed together.

Always true: a slot becomes free only after the commit that deletes its record is durable, and a page is found only
after the commit that inserts it. A commit that the full disk refuses leaves both as they were; where LMDB gives up,
nobody knows which of the two states the disk has, and the tier has to be opened again.

Threads: who commits holds `writing`. `state` guards the slots and is held for no I/O but a look into the catalog:
looking a page up and pinning its slot is one step, and so is freeing one.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from kvd.storage.failpoints import reach
from kvd.storage.nvme.catalog import Catalog, Record, unpack
from kvd.storage.nvme.health import Health
from kvd.storage.nvme.ranking import Ranking
from kvd.storage.nvme.reopen import take_over
from kvd.storage.nvme.segments import fits
from kvd.storage.nvme.slots import Slots
from kvd.storage.quota import Share
from kvd.storage.tier import Buffers, Name, Page, TierError, WriteRefused


class Ledger:
    """The records and the slots of a tier."""

    def __init__(self, catalog: Catalog, segments: int, health: Health, shares: Mapping[str, Share]) -> None:
        self.slots = Slots(segments, shares)
        self.writing = threading.Lock()
        self.state = threading.Lock()
        self._catalog = catalog
        self._health = health
        self._left: dict[Name, None] = {}
        self._sequence = 0

    def recover(self) -> None:
        """Take over the pages of the catalog, and drop those that cannot be right."""
        void, self._sequence = take_over(self._catalog.heads, self.slots)
        if void:
            reach("nvme.open.before_drop")
            if not self._commit(delete=void):
                raise TierError("the disk is too full to open the tier", "make room on it")
            self._health.counters["dropped_at_open"] += len(void)
            self._left.update(dict.fromkeys(void))
        reach("nvme.open.after_drop")

    # -- looking -------------------------------------------------------------------------------------------

    def records(self, names: Sequence[Name]) -> list[Record | None]:
        values = self._catalog.values(names)
        return [unpack(name, value) if value else None for name, value in zip(names, values, strict=True)]

    def pin(self, wanted: Sequence[tuple[Name, Buffers]]) -> tuple[list[bytes | None], dict[int, Record]]:
        """Look pages up, and keep the slots of those that fit their buffers from reuse until `unpin`."""
        pinned: dict[int, Record] = {}
        with self.state:
            values = self._catalog.values([name for name, _ in wanted])
            for at, ((name, buffers), value) in enumerate(zip(wanted, values, strict=True)):
                record = unpack(name, value) if value else None
                if record and fits(record.page, buffers) and self.slots.pin(record.slot):
                    pinned[at] = record
        return values, pinned

    def unpin(self, records: Iterable[Record]) -> None:
        with self.state:
            for record in records:
                self.slots.unpin(record.slot)

    def touch(self, record: Record, kind: int) -> None:
        """A page was put that is held already."""
        with self.state:
            self.slots.use(record.slot, kind)
            self._left.pop(record.page.name, None)

    def used(self, pages: Sequence[tuple[Name, int]]) -> None:
        """Pages were used elsewhere, and are of these kinds now."""
        self.tick()
        with self.state:
            for (_, kind), record in zip(pages, self.records([name for name, _ in pages]), strict=True):
                if record:
                    self.slots.use(record.slot, kind)

    def judge(self, ranking: Ranking) -> None:
        """This is what was learnt of which pages are worth keeping."""
        with self.state:
            self.slots.judge(ranking)

    def expire(self, ttl_s: float, most: int) -> None:
        """Evict up to `most` pages that nobody has used for so long. While `writing` is held."""
        before = int(1000 * (self.tick() - ttl_s))
        with self.state:
            overdue = self.slots.unused_since(before, most)
        if overdue and self.evict(overdue):
            self._health.counters["expired"] += len(overdue)

    def tick(self) -> int:
        """Let the slots know the time; it in seconds since 1970."""
        now = time.time()
        with self.state:
            self.slots.tick(int(1000 * now))
        return int(now)

    def news(self) -> list[Name]:
        """What left since the last call without the caller's doing."""
        with self.state:
            left = list(self._left)
            self._left.clear()
            return left

    def faults(self) -> list[str]:
        """Broken invariants, in words. Reads every record."""
        with self.writing, self.state:
            owned = {int(slot) for piece in self._catalog.heads() for slot in piece.heads["slot"]}
            return self.slots.faults(owned)

    # -- changing, while `writing` is held -----------------------------------------------------------------

    def publish(self, pages: Sequence[tuple[int, Page]], old: Sequence[int], victims: Sequence[int]) -> bool:
        """Pages whose payload is durable come, with their slots; those in `old` and `victims` go, in one commit.

        False: the disk is too full for it, the slots of the new pages are free again and all else is as it was.
        """
        with self.state:
            names = [self.slots.name(slot) for slot in victims]
        now = self.tick()
        records = [Record(slot, self._sequence + 1, page, now) for slot, page in pages]
        if not self._commit(records, names):
            with self.state:
                self.slots.release(slot for slot, _ in pages)
                self.slots.keep(victims)
            return False
        self._sequence += 1
        with self.state:
            for slot, page in pages:
                self.slots.fill(slot, page.name, page.kind)
                self._left.pop(page.name, None)
            self.slots.release(old)
        self._gone(victims, names)
        self._health.counters["stored"] += len(pages)
        reach("nvme.put.after_commit")
        return True

    def evict(self, victims: Sequence[int]) -> bool:
        """Now, in a commit of its own. False: the disk is too full even for that."""
        with self.state:
            names = [self.slots.name(slot) for slot in victims]
        if victims and not self._commit(delete=names):
            with self.state:
                self.slots.keep(victims)
            return False
        self._gone(victims, names)
        reach("nvme.evict.after_commit")
        return True

    def _gone(self, slots: Sequence[int], names: Sequence[Name]) -> None:
        """Evicted, and the commit that says so is durable."""
        with self.state:
            self.slots.release(slots)
            self._left.update(dict.fromkeys(names))
        if slots:
            self._health.counters["evicted"] += len(slots)

    def remove(self, names: Sequence[Name]) -> None:
        unique = list(dict.fromkeys(names))
        self._forget([(n, unpack(n, v)) for n, v in zip(unique, self._catalog.values(unique), strict=True) if v])

    def drop(self, suspects: Sequence[tuple[Name, bytes | None]], why: str) -> None:
        """Remove what was found unusable, unless the record is another one by now."""
        now = self._catalog.values([name for name, _ in suspects])
        same = {name: value for (name, value), at in zip(suspects, now, strict=True) if value and value == at}
        self._forget([(name, unpack(name, value)) for name, value in same.items()])
        if same:
            self._health.counters[why] += len(same)
        with self.state:
            self._left.update(dict.fromkeys(same))

    def _forget(self, records: Sequence[tuple[Name, Record | None]]) -> None:
        """Delete records. One whose seal is broken says nothing of its slot, which stays taken until reopened."""
        if not records:
            return
        reach("nvme.remove.before_commit")
        if not self._commit(delete=[name for name, _ in records]):
            raise WriteRefused("the disk is too full to remove", "make room on it")
        with self.state:
            self.slots.release(record.slot for _, record in records if record)
        reach("nvme.remove.after_commit")

    def _commit(self, insert: Sequence[Record] = (), delete: Sequence[Name] = ()) -> bool:
        try:
            return self._catalog.commit(insert, delete)
        except TierError as why:  # nobody knows which of the two states it is: only opening it again tells
            self._health.give_up(str(why))
            raise
