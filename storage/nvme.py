"""The NVMe tier: payloads in segment files, what is where in a catalog. Implements `kvd.storage.tier.Tier`.

    FOLDER/lock                 held (flock) by the one process that has the tier open
    FOLDER/catalog/             see catalog.py
    FOLDER/segment-00000.kvd    see segments.py

A put is: take free slots; payloads, several in flight; barrier on each segment written; one commit that inserts the
new records and deletes those of the pages evicted to have free slots for the next put. A victim's slot is reused only
after that commit. So a crash at any instruction leaves each page in the catalog whole, and all others absent; what
was acknowledged survives power loss. Recovery reads the catalog and the segments' headers, never a payload.

Threads: one put or remove at a time (`_writing`), any number of gets beside it. `_state` guards the slots and is held
for no I/O but a look into the catalog: looking a page up and pinning its slot is one step, and so is freeing one.

What the disk refuses is counted and costs the pages concerned; when it refuses STRIKES calls in a row, or LMDB gives
up, the tier raises TierError, and in the latter case has to be opened again.
"""

import errno
import fcntl
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import xxhash

from kvd.storage.catalog import Catalog, Record, unpack
from kvd.storage.failpoints import reach
from kvd.storage.reopen import take_over
from kvd.storage.segments import Segments, aligned, slots_per_segment
from kvd.storage.slots import POSITION_BITS, Slots
from kvd.storage.tier import Buffers, Name, News, Page, TierError, Usage

STRIKES: Final = 5
RETRY_S: Final = 30.0  # how long a disk that was full is believed to be

T = TypeVar("T")


class Entry(NamedTuple):
    """A page on its way in."""

    at: int  # in the caller's list
    page: Page
    buffers: Buffers
    slot: int


class NvmeTier:
    """Pages on a local disk."""

    def __init__(self, folder: Path, size_bytes: int, segment_bytes: int = 256 << 20, threads: int = 4) -> None:
        """Opens or makes the tier in `folder`, of at most `size_bytes`. Raises TierError where it cannot."""
        self._limit = size_bytes // segment_bytes
        if self._limit < 1:
            raise TierError(f"{size_bytes} bytes hold no segment of {segment_bytes}", "give the tier more room")
        self.counters: Counter[str] = Counter()
        self._segment_bytes = segment_bytes
        self._lock_file = _lock(folder)
        try:
            self._catalog = Catalog(folder / "catalog", segment_bytes, max(1 << 30, size_bytes // 8))
        except BaseException:
            os.close(self._lock_file)
            raise
        self._segments = Segments(folder, segment_bytes, self._catalog.uuid)
        self._slots = Slots(self._limit)
        self._writing = threading.Lock()
        self._state = threading.Lock()
        self._left: dict[Name, None] = {}
        self._reserve: dict[int, int] = {}  # slots to keep free, by size class
        self._sequence = 0
        self._strikes = 0
        self._full = False  # the disk, when a segment was last to be made
        self._full_until = 0.0
        self._broken = ""  # why no call works any more
        self._idle = threading.Condition()
        self._inside = 0
        self._pool = ThreadPoolExecutor(threads, "nvme")
        self._threads = threads
        try:
            with self._disk():
                self._recover()
        except BaseException:
            self.close()
            raise

    # -- opening and closing -------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Take over the pages of the catalog, and drop those that cannot be right."""
        for number, slot_bytes in self._segments.open(self._limit).items():
            self._slots.assign(number, slot_bytes, slots_per_segment(self._segment_bytes, slot_bytes))
        void, self._sequence = take_over(self._catalog.heads, self._slots)
        if void:
            reach("nvme.open.before_drop")
            if not self._commit(delete=void):
                raise TierError("the disk is too full to open the tier", "make room on it")
            self.counters["dropped_at_open"] += len(void)
            self._left.update(dict.fromkeys(void))
        reach("nvme.open.after_drop")
        self._segments.drop_beyond(self._limit)

    def close(self) -> None:
        """Waits for calls in progress. May be called twice."""
        with self._idle:
            self._broken = self._broken or "the tier is closed"
            while self._inside:
                self._idle.wait()
        self._pool.shutdown()
        self._segments.close()
        self._catalog.close()
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Around every call: refused where the tier is broken or closed, awaited by `close`."""
        with self._idle:
            if self._broken:
                raise TierError(self._broken, "open it again")
            self._inside += 1
        try:
            with self._disk():
                yield
        finally:
            with self._idle:
                self._inside -= 1
                self._idle.notify_all()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """What the disk raises and nobody expected here."""
        try:
            yield
        except OSError as why:
            self.counters["io_error"] += 1
            raise TierError(f"the disk fails: {why}") from why

    # -- storing -------------------------------------------------------------------------------------------

    def put(self, pages: Sequence[tuple[Page, Buffers]]) -> list[bool]:
        with self._call(), self._writing:
            held, fresh, replaced = self._sort(pages)
            with self._state:
                self._slots.tick()
            entries = self._place(pages, fresh)
            durable: set[int] = set()
            try:
                reach("nvme.put.placed")
                durable = self._write(entries)
            finally:
                with self._state:
                    self._slots.release(entry.slot for entry in entries if entry.slot not in durable)
            written = [entry for entry in entries if entry.slot in durable]
            stored = {entry.page.name for entry in written} if written and self._publish(written, replaced) else set()
            self._judge(len(entries) - len(durable), len(entries), "write_error")
            return [
                at in held or (page.name in stored and _fits(page, buffers))
                for at, (page, buffers) in enumerate(pages)
            ]

    def _sort(self, pages: Sequence[tuple[Page, Buffers]]) -> tuple[set[int], dict[Name, int], dict[Name, Record]]:
        """Which pages are held already, where in the list the new ones are, and what of other sizes they replace."""
        held: set[int] = set()
        fresh: dict[Name, int] = {}
        replaced: dict[Name, Record] = {}
        values = self._catalog.values([page.name for page, _ in pages])
        for at, ((page, buffers), value) in enumerate(zip(pages, values, strict=True)):
            if not _fits(page, buffers) or not slots_per_segment(self._segment_bytes, _slot_bytes(page)):
                self.counters["wrong_size"] += 1
                continue
            record = unpack(page.name, value) if value else None
            if record and (record.page.length, record.page.shards) == (page.length, page.shards):
                held.add(at)
                with self._state:
                    self._slots.touch(record.slot)
                    self._left.pop(page.name, None)
                continue
            fresh.setdefault(page.name, at)
            if record:
                replaced[page.name] = record
        return held, fresh, replaced

    def _place(self, pages: Sequence[tuple[Page, Buffers]], fresh: dict[Name, int]) -> list[Entry]:
        """Slots for the new pages, as far as there is room."""
        by_class: dict[int, list[int]] = {}
        for at in fresh.values():
            by_class.setdefault(_slot_bytes(pages[at][0]), []).append(at)
        entries: list[Entry] = []
        for slot_bytes, positions in by_class.items():
            self._make_room(slot_bytes, len(positions))
            with self._state:
                slots = self._slots.take(slot_bytes, len(positions))
            self._reserve[slot_bytes] = max(len(positions), self._reserve.get(slot_bytes, 0) * 7 // 8)
            entries += [Entry(at, *pages[at], slot) for at, slot in zip(positions, slots, strict=False)]
            if len(slots) < len(positions):
                self.counters["no_room"] += len(positions) - len(slots)
        return entries

    def _make_room(self, slot_bytes: int, count: int) -> None:
        """Have `count` free slots of a class: from new segments, from other classes, by evicting its own pages."""
        while (missing := count - self._free(slot_bytes)) > 0:
            if self._add_segment(slot_bytes) or self._take_over(slot_bytes):
                continue
            with self._state:
                victims = self._slots.victims(slot_bytes, missing)
            if not victims or not self._evict(victims):
                return

    def _free(self, slot_bytes: int) -> int:
        with self._state:
            return self._slots.free(slot_bytes)

    def _add_segment(self, slot_bytes: int) -> bool:
        """A segment that belongs to no class, made now where there is no file yet."""
        with self._state:
            unassigned = self._slots.unassigned()
        for number in sorted(unassigned, key=lambda number: number not in self._segments):
            made = number in self._segments
            if not made and self._full and time.monotonic() < self._full_until:
                return False
            try:
                (self._segments.assign if made else self._segments.create)(number, slot_bytes)
            except OSError as why:
                self.counters["disk_full" if why.errno in (errno.ENOSPC, errno.EDQUOT) else "io_error"] += 1
                self._full, self._full_until = True, time.monotonic() + RETRY_S
                return False
            self._full = False
            with self._state:
                self._slots.assign(number, slot_bytes, slots_per_segment(self._segment_bytes, slot_bytes))
            return True
        return False

    def _take_over(self, slot_bytes: int) -> bool:
        """A segment of another class, without its pages."""
        with self._state:
            number = self._slots.coldest(slot_bytes)
            victims = self._slots.leave_all(number) if number is not None else []
        if number is None:
            return False
        if not self._evict(victims):
            return False
        with self._state:
            self._slots.withdraw(number)
        return self._add_segment(slot_bytes)

    def _evict(self, victims: Sequence[int]) -> bool:
        """Now, in a commit of its own. False: the disk is too full even for that."""
        with self._state:
            names = [self._slots.name(slot) for slot in victims]
        if victims and not self._commit(delete=names):
            with self._state:
                self._slots.keep(victims)
            return False
        self._gone(victims, names)
        reach("nvme.evict.after_commit")
        return True

    def _write(self, entries: Sequence[Entry]) -> set[int]:
        """Payloads and barrier. Returns the slots whose payload is durable."""
        durable = {entry.slot for entry in entries}
        lost: list[int] = []  # segments

        def write(entry: Entry) -> None:
            try:
                self._segments.write(entry.slot, entry.buffers)
            except OSError:
                durable.discard(entry.slot)

        def sync(number: int) -> None:
            try:
                self._segments.sync(number)
            except OSError:
                lost.append(number)

        self._each(write, entries)
        reach("nvme.put.after_payload")
        self._each(sync, sorted({entry.slot >> POSITION_BITS for entry in entries}))
        reach("nvme.put.after_barrier")
        return {slot for slot in durable if slot >> POSITION_BITS not in lost}

    def _publish(self, entries: Sequence[Entry], replaced: dict[Name, Record]) -> bool:
        """The commit, and what follows from it. False: the disk is too full for it, and nothing changed."""
        old = [replaced[entry.page.name].slot for entry in entries if entry.page.name in replaced]
        victims = self._refill({_slot_bytes(entry.page) for entry in entries}, old)
        with self._state:
            names = [self._slots.name(slot) for slot in victims]
        records = [Record(entry.slot, self._sequence + 1, entry.page) for entry in entries]
        if not self._commit(records, names):
            with self._state:
                self._slots.release(entry.slot for entry in entries)
                self._slots.keep(victims)
            return False
        self._sequence += 1
        with self._state:
            for entry in entries:
                self._slots.fill(entry.slot, entry.page.name)
                self._left.pop(entry.page.name, None)
            self._slots.release(old)
        self._gone(victims, names)
        self.counters["stored"] += len(entries)
        reach("nvme.put.after_commit")
        return True

    def _refill(self, classes: set[int], not_these: Sequence[int]) -> list[int]:
        """Victims that leave a class enough free slots for the next put, without a commit of its own then."""
        victims: list[int] = []
        with self._state:
            growing = not self._full and bool(self._slots.unassigned())
            for slot_bytes in classes:
                wanted = min(self._reserve[slot_bytes], self._slots.total(slot_bytes) // 4)
                missing = wanted - self._slots.free(slot_bytes)
                if missing > 0 and not growing and self._slots.coldest(slot_bytes) is None:
                    chosen = self._slots.victims(slot_bytes, missing)
                    self._slots.keep(slot for slot in chosen if slot in not_these)
                    victims += [slot for slot in chosen if slot not in not_these]
        return victims

    def _gone(self, slots: Sequence[int], names: Sequence[Name]) -> None:
        """Evicted, and the commit that says so is durable."""
        with self._state:
            self._slots.release(slots)
            self._left.update(dict.fromkeys(names))
        if slots:
            self.counters["evicted"] += len(slots)

    def remove(self, names: Sequence[Name]) -> None:
        with self._call(), self._writing:
            unique = list(dict.fromkeys(names))
            records = [(n, unpack(n, v)) for n, v in zip(unique, self._catalog.values(unique), strict=True) if v]
            self._forget(records)

    def _forget(self, records: Sequence[tuple[Name, Record | None]]) -> None:
        """Delete records. One whose seal is broken says nothing of its slot, which stays taken until reopened."""
        if not records:
            return
        reach("nvme.remove.before_commit")
        if not self._commit(delete=[name for name, _ in records]):
            raise TierError("the disk is too full to remove", "make room on it")
        with self._state:
            self._slots.release(record.slot for _, record in records if record)
        reach("nvme.remove.after_commit")

    def _commit(self, insert: Sequence[Record] = (), delete: Sequence[Name] = ()) -> bool:
        try:
            return self._catalog.commit(insert, delete)
        except TierError as why:  # nobody knows which of the two states it is: only opening it again tells
            self._broken = str(why)
            raise

    # -- reading -------------------------------------------------------------------------------------------

    def find(self, names: Sequence[Name]) -> list[Page | None]:
        with self._call():
            values = self._catalog.values(names)
            records = [unpack(name, value) if value else None for name, value in zip(names, values, strict=True)]
            return [record.page if record else None for record in records]

    def get(self, wanted: Sequence[tuple[Name, Buffers]]) -> list[Page | None]:
        with self._call():
            found: list[Page | None] = [None] * len(wanted)
            values, pinned = self._pin(wanted)
            failed: list[int] = []
            damaged = [at for at, value in enumerate(values) if value and not unpack(wanted[at][0], value)]

            def read(at: int) -> None:
                record = pinned[at]
                buffers = wanted[at][1]
                try:
                    whole = self._segments.read(record.slot, buffers)
                except OSError:
                    failed.append(at)
                    return
                if whole and _right(record.page, buffers):
                    found[at] = record.page
                else:
                    damaged.append(at)

            try:
                self._each(read, list(pinned))
            finally:
                with self._state:
                    for record in pinned.values():
                        self._slots.unpin(record.slot)
            if damaged:
                self._drop_damaged([(wanted[at][0], values[at]) for at in damaged])
            self._judge(len(failed), len(pinned), "read_error")
            return found

    def _pin(self, wanted: Sequence[tuple[Name, Buffers]]) -> tuple[list[bytes | None], dict[int, Record]]:
        """Look the pages up, and keep the slots of those that fit their buffers from reuse."""
        pinned: dict[int, Record] = {}
        with self._state:
            values = self._catalog.values([name for name, _ in wanted])
            for at, ((name, buffers), value) in enumerate(zip(wanted, values, strict=True)):
                record = unpack(name, value) if value else None
                if record and _fits(record.page, buffers) and self._slots.pin(record.slot):
                    pinned[at] = record
        return values, pinned

    def _drop_damaged(self, suspects: Sequence[tuple[Name, bytes | None]]) -> None:
        """Remove what was found damaged, unless the record is another one by now."""
        with self._writing:
            now = self._catalog.values([name for name, _ in suspects])
            same = {name: value for (name, value), at in zip(suspects, now, strict=True) if value and value == at}
            self._forget([(name, unpack(name, value)) for name, value in same.items()])
            if same:
                self.counters["damaged"] += len(same)
            with self._state:
                self._left.update(dict.fromkeys(same))

    def names(self) -> Iterator[list[Name]]:
        pieces = self._catalog.names()
        while True:
            with self._call():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    # -- the rest ------------------------------------------------------------------------------------------

    def news(self) -> News:
        with self._call(), self._state:
            left = list(self._left)
            self._left.clear()
            return News([], left)

    def usage(self) -> Usage:
        with self._call():
            segments = len(self._segments) if self._full else self._limit
            with self._state:
                used = self._slots.used_bytes
            return Usage(len(self._catalog), used, segments * self._segment_bytes)

    def faults(self) -> list[str]:
        """Broken invariants, in words. Reads every record: for tests and for operators who ask."""
        with self._call(), self._writing, self._state:
            owned = {int(slot) for piece in self._catalog.heads() for slot in piece.heads["slot"]}
            return self._slots.faults(owned)

    def _judge(self, failed: int, tried: int, what: str) -> None:
        """Count what the disk failed to do in a call. Raises when that happened in too many calls in a row."""
        if failed:
            self.counters[what] += failed
            self._strikes += 1
            if self._strikes >= STRIKES:
                raise TierError(f"the disk failed in {self._strikes} calls in a row", "look at the kernel's log")
        elif tried:
            self._strikes = 0

    def _each(self, do: Callable[[T], None], items: Sequence[T]) -> None:
        """`do` every item, several at a time: this thread and the pool's take one after the other."""
        queue = iter(items)  # the GIL makes `next` of it one step

        def work() -> None:
            for item in queue:
                do(item)

        helpers = [self._pool.submit(work) for _ in range(min(self._threads, len(items)) - 1)]
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()


def _slot_bytes(page: Page) -> int:
    return page.shards * aligned(page.length)


def _fits(page: Page, buffers: Buffers) -> bool:
    """The page can be stored, and these are buffers for it."""
    if not 0 < page.length < 1 << 32 or not 0 < page.shards == len(buffers) < 1 << 16:
        return False
    return all(len(buffer) == aligned(page.length) for buffer in buffers)


def _right(page: Page, buffers: Buffers) -> bool:
    return all(
        xxhash.xxh3_128_digest(buffer[: page.length]) == checksum
        for buffer, checksum in zip(buffers, page.checksums, strict=True)
    )


def _lock(folder: Path) -> int:
    """Own the folder until the descriptor is closed, also by death."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as why:
        raise TierError(f"cannot use {folder}: {why}", "the tier needs a folder it may write to") from why
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as why:
        os.close(descriptor)
        raise TierError(f"{folder} is in use by another process", "one kvd per folder") from why
    return descriptor
