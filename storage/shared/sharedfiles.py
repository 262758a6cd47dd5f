"""The files of a shared tier: what this node has read of them, and how it adds files and deletes them.

    <root>/<node>/<stamp, 16 hex digits>-<random, 16>.pages.arrow       storage/shared/sealed.py
    <root>/<node>/<stamp, 16 hex digits>-<random, 16>.graves.arrow      storage/graves.py

A node writes files in its own folder only and reads everybody's. Names are never used twice and files never change, so
nodes need no lock, and two daemons that were given one node name by mistake do no harm. What is not named like this is
left alone. Thread-safe; no file is read or written under the lock. Raises TierError; WriteRefused where only reading
goes on.
"""

import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

from kvd.storage.shared import graves
from kvd.storage.shared.changes import Changes
from kvd.storage.shared.copies import Copies, SealedFile
from kvd.storage.shared.depot import Depot, Entry
from kvd.storage.shared.refusal import Refusal, is_refusal
from kvd.storage.shared.sealed import Row, Unreadable, fits, lay_out
from kvd.storage.shared.sealedreads import ABSENT, DAMAGED, GOOD, Wish, index_of, read_pages
from kvd.storage.shared.stamps import Stamps, at
from kvd.storage.tier import Buffers, Name, News, Page, TierError

_FILE: Final = re.compile(r"([\w.-]+)/([0-9a-f]{16})-[0-9a-f]{16}\.(pages|graves)\.arrow", re.ASCII)
_TEMPORARY: Final = re.compile(r"[\w.-]+/\.[0-9a-f]{16}-[0-9a-f]{16}\.(pages|graves)\.arrow\.[0-9]+\.tmp", re.ASCII)
_AHEAD_S: Final = 86_400.0  # whose clock is further ahead would drag all clocks along
_SET_S: Final = 3600.0  # a clock that runs is never so far off in the time between two looks


class SharedFiles:
    def __init__(self, depot: Depot, node: str, max_pages: int, tenants: Collection[str]) -> None:
        """`tenants`: those with a share; files of others are nobody's."""
        self.depot = depot
        self.node = node
        self.lock = threading.RLock()
        self.copies = Copies()
        self.sizes: dict[str, int] = {}  # of all files named like ours
        self.graves: dict[str, Mapping[Name, int]] = {}  # what each file of graves says
        self.leftovers: dict[str, int] = {}  # temporary and damaged files, with their sizes
        self.postponed: dict[str, int] = {}  # files to be read at another time, with the pages that need room
        self.undeletable: set[str] = set()  # when it was last tried
        self.counters: Counter[str] = Counter()
        self.refusal = Refusal(self.counters)
        self.max_pages = max_pages
        self._tenants = tenants
        self._ignored: set[str] = set()
        self._future: set[str] = set()  # of these, by our clock
        self._clock_ahead_s = time.time() - time.monotonic()
        self._stamps = Stamps()
        self.changes = Changes()  # under the lock
        self._pool = ThreadPoolExecutor(depot.parallel, "kvd-shared")

    @property
    def bytes_used(self) -> int:
        with self.lock:
            return sum(self.sizes.values())

    def close(self) -> None:
        self._pool.shutdown()
        self.depot.close()

    def stamp(self) -> int:
        with self.lock:
            return self._stamps.next(time.time())

    def news(self) -> News:
        with self.lock:
            return self.changes.take()

    def refresh(self) -> None:
        """List all files; read the indexes of new ones, forget those that are gone."""
        with self.lock:
            known = set(self.sizes)  # a file of ours that is published from now on may be missing in the list
            due = {path for path, pages in self.postponed.items() if self._has_room(pages)}
            if self._clock_was_set():
                self._check_stamps()
                due |= self._future
                self._ignored -= self._future
            passed = known - due | self._ignored
        with as_tier_errors():
            entries = self.depot.entries()
            new = [entry for entry in entries if entry.path not in passed]
            ours = [(entry, match) for entry in new if (match := _FILE.fullmatch(entry.path))]
            ours.sort(key=lambda one: one[1][2], reverse=True)  # where not all can be known, the youngest are
            self.depot.settle([entry.path for entry, _ in ours])
        # Graves first, so that what is in one does not come and go.
        for kind, read in (("graves", self._read_graves), ("pages", self._read_pages)):
            list(self._pool.map(read, [entry for entry, match in ours if match[3] == kind]))
        there = {entry.path for entry in entries}
        with self.lock:
            for path in known - there:
                self.forget(path)
            self._ignored &= there
            self._future &= self._ignored
            matched = {entry.path for entry, _ in ours}
            self.leftovers = {path: size for path, size in self.leftovers.items() if path in there}
            for entry in new:
                if entry.path not in matched:
                    temporary = _TEMPORARY.fullmatch(entry.path)  # others' files may end like that, and are left alone
                    self._ignore(entry, "temporary" if temporary else "foreign")

    def _clock_was_set(self) -> bool:
        """Since the last look: what seemed to be of the future may not be."""
        before, self._clock_ahead_s = self._clock_ahead_s, time.time() - time.monotonic()
        return abs(self._clock_ahead_s - before) > _SET_S

    def _check_stamps(self) -> None:
        """Ours only rise: where they are of the future now, others would skip all that we write."""
        if self._stamps.last > at(time.time() + _AHEAD_S):
            raise TierError("shared tier: stamps a day ahead of the clock, which was set", "it opens anew by itself")

    def forget(self, path: str) -> None:
        """A file is not there any more."""
        with self.lock:
            self.sizes.pop(path, None)
            self.postponed.pop(path, None)
            self.undeletable.discard(path)
            if path in self.copies.files:
                self.changes.left(self.copies.withdraw(path))
            if self.graves.pop(path, None) is not None:
                together: dict[Name, int] = {}
                for said in self.graves.values():
                    for name, stamp in said.items():
                        together[name] = max(stamp, together.get(name, -1))
                self.copies.graves = together

    def fetch(self, wanted: Sequence[tuple[Name, Buffers]]) -> list[Row | None]:
        """Read and verify pages. What is found damaged is buried, what is absent forgotten, and other copies tried."""
        found: list[Row | None] = [None] * len(wanted)
        trying = set(range(len(wanted)))
        while trying:
            files: dict[str, list[Wish]] = {}
            with self.lock:
                for number in trying:
                    name, buffers = wanted[number]
                    if (place := self.copies.place(name)) and fits(place.row.page, buffers):
                        files.setdefault(place.file.path, []).append(Wish(number, place.row, buffers))
            trying = set()
            damaged: dict[Name, int] = {}
            for path, (number, row, _), word in read_pages(self.depot, self._pool, files):
                if word == GOOD:
                    found[number] = row
                    continue
                self.counters[word] += 1
                if word == ABSENT:
                    self.forget(path)
                    trying.add(number)
                elif word == DAMAGED:
                    damaged[row.page.name] = row.stamp
                    trying.add(number)
            if damaged:
                self._bury_damaged(damaged)
        return found

    def store(
        self, pages: Sequence[tuple[Page, Buffers]], stamps: Sequence[int] | None, tenant: str,
        room: Callable[[int], bool],
    ) -> bool:  # fmt: skip
        """One file of these pages, durable when True; False when there is no `room` for its bytes.

        `stamps`: the pages are moved, not new. `tenant`: whose share they count against, "" for nobody's.
        """
        stamp = self.stamp()
        sheet = lay_out(pages, stamps or [stamp] * len(pages), self.node, tenant=tenant)
        path = self._path(stamp, "pages")
        if not room(sheet.size):
            return False
        with self.refusal.noticed():
            self.depot.publish(path, sheet.parts, sheet.size, sheet.direct)
        with self.lock:
            self.sizes[path] = sheet.size
            came = self.copies.add(SealedFile(path, stamp, sheet.size, sheet.rows, tenant))
            if stamps:
                self.changes.came(came)
            else:
                self.changes.knows(page.name for page, _ in pages)
        return True

    def bury(self, dead: Mapping[Name, int]) -> list[Name]:
        """Make it known to all nodes that these pages are dead up to a stamp."""
        data, path = graves.encode(dead), self._path(self.stamp(), "graves")
        with self.refusal.noticed():
            self.depot.publish(path, [memoryview(data)], len(data), direct=False)
        with self.lock:
            self.sizes[path] = len(data)
            self.graves[path] = dict(dead)
            return self.copies.bury(dead.items())

    def delete(self, path: str) -> bool:
        """Delete a file of anybody's, and what we know of it. False: we may not, and it stays `undeletable`."""
        with as_tier_errors():
            try:
                self.depot.delete(path)
            except OSError as error:
                if not is_refusal(error):
                    raise
                with self.lock:
                    self.counters["undeletable"] += path not in self.undeletable
                    self.undeletable.add(path)
                return False
        self.forget(path)
        return True

    def _path(self, stamp: int, kind: str) -> str:
        return f"{self.node}/{stamp:016x}-{secrets.token_hex(8)}.{kind}.arrow"

    def _bury_damaged(self, damaged: Mapping[Name, int]) -> None:
        try:
            gone = self.bury(damaged)
        except TierError:  # not even that can be written: the others will find out themselves
            self.counters["unburied"] += 1
            with self.lock:
                gone = self.copies.bury(damaged.items())
        with self.lock:
            self.changes.left(gone)

    def _read_graves(self, entry: Entry) -> None:
        self._read(entry, self._add_graves)

    def _read_pages(self, entry: Entry) -> None:
        self._read(entry, self._add_pages)

    def _read(self, entry: Entry, add: Callable[[Entry, int], None]) -> None:
        match = _FILE.fullmatch(entry.path)
        assert match, "only what is named like ours is read"
        stamp = int(match[2], 16)
        try:
            if stamp > at(time.time() + _AHEAD_S):
                raise Unreadable("future")
            add(entry, stamp)
        except _Postponed as error:
            with self.lock:
                self.counters["too many pages"] += entry.path not in self.postponed
                self.postponed[entry.path] = error.pages
                self.sizes[entry.path] = entry.size
        except Unreadable as error:
            self._ignore(entry, error.reason)
            with self.lock:
                self.postponed.pop(entry.path, None)
                self.sizes[entry.path] = entry.size
        except FileNotFoundError:
            return  # deleted since it was listed
        except OSError:
            self.counters["unreadable"] += 1  # tried again at the next poll
        else:
            with self.lock:
                self._stamps.saw(stamp)
                self.sizes[entry.path] = entry.size
                self.postponed.pop(entry.path, None)

    def _add_graves(self, entry: Entry, stamp: int) -> None:
        if entry.size > graves.MAX_BYTES:
            raise Unreadable("damaged")
        said = graves.decode(self.depot.read_bytes(entry.path, 0, entry.size), stamp)
        with self.lock:
            if entry.path not in self.graves:
                self.graves[entry.path] = said
                self.changes.left(self.copies.bury(said.items()))

    def _add_pages(self, entry: Entry, stamp: int) -> None:
        rows, named = index_of(self.depot, entry, stamp)
        tenant = named if named in self._tenants else ""
        with self.lock:
            if entry.path in self.copies.files:
                return
            if not self._has_room(len(rows)):
                raise _Postponed(len(rows))
            self.changes.came(self.copies.add(SealedFile(entry.path, stamp, entry.size, rows, tenant)))

    def _has_room(self, pages: int) -> bool:
        return len(self.copies) + pages <= self.max_pages

    def _ignore(self, entry: Entry, reason: str) -> None:
        with self.lock:
            self.counters[reason] += 1
            self._ignored.add(entry.path)
            if reason == "future":
                self._future.add(entry.path)
            if reason in ("temporary", "damaged", "truncated"):
                self.leftovers[entry.path] = entry.size


class _Postponed(Exception):
    """A file is not to be read now; once so many pages have left it is."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self.pages = pages


@contextmanager
def as_tier_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TierError(f"shared tier: {error}", "is the file system there, writable, and not full?") from error
