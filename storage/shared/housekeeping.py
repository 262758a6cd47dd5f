"""What a node does for a shared tier now and then: age-out, merging, and sweeping up after crashes.

A new file is published before the old ones go, and those go only after they were seen to hold nothing that counts for
a grace period: who still reads them by an old index finds them, or finds them gone, which is a miss. "Seen for" is by
this process's own clock, so no other machine's clock and no file time can delete anything. A crash in between leaves
both files, and then the next start finds the old one dead.
"""

import mmap
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from kvd.storage.quota import Share
from kvd.storage.shared import compaction, makingroom
from kvd.storage.shared.copies import SealedFile, needed
from kvd.storage.shared.graves import MOST_NAMES
from kvd.storage.shared.sealed import ALIGN, lay_out
from kvd.storage.shared.sharedfiles import SharedFiles
from kvd.storage.shared.stamps import at
from kvd.storage.tier import Buffers, Name, Page, WriteRefused

_GRAVE_FILES: Final = 16
_YOUNG_GRAVE_S: Final = 3600.0  # a compaction that did not know of a grave is over by then


@dataclass(slots=True)
class Housekeeping:
    files: SharedFiles
    quota_bytes: int
    shares: Mapping[str, Share]
    file_bytes: int
    ttl_s: float | None
    grace_s: float
    leftover_s: float
    _since: dict[str, float] = field(default_factory=dict)  # since when a file is useless
    _needs: dict[str, str] = field(default_factory=dict)  # a file of graves, and one with what it hides

    def step(self) -> None:
        """All that is due, but at most one file is written. Raises TierError."""
        if self.ttl_s is not None:
            with self.files.lock:
                self.files.changes.left(self.files.copies.expire(at(time.time() - self.ttl_s)))
        self._sweep()
        if not self.files.refusal.lasts:
            with suppress(WriteRefused):
                self._merge_pages()
                self._merge_graves()

    def make_room(self, tenant: str, pages: int, needed_bytes: int) -> bool:
        """Delete files, so that a file of the tenant's fits the quota, and its pages what a node may know of.

        False when they cannot.
        """
        files = self.files
        if needed_bytes > self.quota_bytes or pages > files.max_pages:
            return False
        if self._room_made(tenant, pages, needed_bytes):
            return True
        with files.lock:
            again = files.undeletable & files.copies.files.keys()
            files.undeletable -= again  # they may be deletable by now
        return bool(again) and self._room_made(tenant, pages, needed_bytes)

    def _room_made(self, tenant: str, pages: int, needed_bytes: int) -> bool:
        files = self.files
        while (chosen := self._victims(tenant, pages, needed_bytes)) is not None:
            gone = [files.delete(file.path) for file in chosen]
            files.counters["evicted files"] += sum(gone)
            if all(gone):
                return self._fits(needed_bytes) and len(files.copies) + pages <= files.max_pages
        return False

    def _victims(self, tenant: str, pages: int, needed_bytes: int) -> list[SealedFile] | None:
        """Of those that may be deleted, as far as is known."""
        files = self.files
        with files.lock:
            excess = files.bytes_used + needed_bytes - self.quota_bytes, len(files.copies) + pages - files.max_pages
            there = [file for path, file in files.copies.files.items() if path not in files.undeletable]
            return makingroom.victims(there, self.shares, tenant, needed_bytes, *excess)

    def _sweep(self) -> None:
        """Files that hold nothing any more: ours soon; those of other nodes, which may be gone, later."""
        mine = f"{self.files.node}/"
        with self.files.lock:
            dead = [file.path for file in self.files.copies.files.values() if not file.live_rows]
        dead += self._outlived()
        wait = {path: self.grace_s if path.startswith(mine) else self.leftover_s for path in dead}
        with self.files.lock:
            wait |= dict.fromkeys(self.files.leftovers, self.leftover_s)
        now = time.monotonic()
        self._since = {path: self._since.get(path, now) for path in wait}
        for path, since in self._since.items():
            if now - since >= wait[path]:
                self.files.counters["swept files"] += self.files.delete(path)

    def _outlived(self) -> list[str]:
        """Graves that hide nothing. Looked at once they are old, and then until a file is found that needs them."""
        young = at(time.time() - _YOUNG_GRAVE_S)
        with self.files.lock:
            there = self.files.copies.files
            self._needs = {path: file for path, file in self._needs.items() if file in there}
            old = {
                path: said for path, said in self.files.graves.items()
                if path not in self._needs and int(path.rpartition("/")[2][:16], 16) < young
            }  # fmt: skip
        hiding = self._needed(name for said in old.values() for name in said) if old else {}
        if hiding is None:
            return []
        self._needs |= {path: hiding[name] for path, said in old.items() for name in said if name in hiding}
        return [path for path in old if path not in self._needs]

    def _needed(self, names: Iterable[Name]) -> dict[Name, str] | None:
        """Graves that hide something, each with a file of it; None: perhaps all, for some files are not read yet."""
        with self.files.lock:
            if self.files.postponed:
                return None
            known = self.files.copies.graves
            graves = {name: known[name] for name in names if name in known}
            files = list(self.files.copies.files.values())
        return needed(graves, files)  # without the lock: it takes long, and no file's rows ever change

    def _merge_pages(self) -> None:
        with self.files.lock:
            own = [file for path, file in self.files.copies.files.items() if path.startswith(f"{self.files.node}/")]
            chosen = compaction.next_merge(own, self.file_bytes)
            rows = [row for file in chosen for row in self.files.copies.live(file)]
        if not rows:
            return
        tenant, pages = chosen[0].tenant, _with_buffers([row.page for row in rows])
        if not self._fits(lay_out(pages, [row.stamp for row in rows], self.files.node, tenant=tenant).size):
            return  # before anything is read, for it may be so for days
        moved: list[tuple[Page, Buffers]] = []
        stamps: list[int] = []
        wanted = [(page.name, buffers) for page, buffers in pages]
        for row, (_, buffers) in zip(self.files.fetch(wanted), wanted, strict=True):
            if row is not None:
                moved.append((row.page, buffers))
                stamps.append(row.stamp)
        if moved and self.files.store(moved, stamps, tenant, self._fits):
            self.files.counters["merged files"] += len(chosen)

    def _fits(self, size: int) -> bool:
        """A merge may not evict for its own sake."""
        return self.files.bytes_used + size <= self.quota_bytes

    def _merge_graves(self) -> None:
        with self.files.lock:
            own = {
                path: said for path, said in self.files.graves.items()
                if path.startswith(f"{self.files.node}/") and path not in self.files.undeletable
            }  # fmt: skip
            if len(own) <= _GRAVE_FILES:
                return
            together: dict[Name, int] = {}
            for said in own.values():
                for name, stamp in said.items():
                    together[name] = max(stamp, together.get(name, -1))
        hiding = self._needed(together)
        young = at(time.time() - _YOUNG_GRAVE_S)
        kept = [(name, s) for name, s in together.items() if s >= young or hiding is None or name in hiding]
        for start in range(0, len(kept), MOST_NAMES):
            self.files.bury(dict(kept[start : start + MOST_NAMES]))
        for path in own:
            self.files.delete(path)


def _with_buffers(pages: Sequence[Page]) -> list[tuple[Page, Buffers]]:
    """All buffers are parts of one mapping, of which a process may not have many."""
    sizes = [-(-page.length // ALIGN) * ALIGN for page in pages]
    memory = memoryview(mmap.mmap(-1, sum(size * page.shards for page, size in zip(pages, sizes, strict=True))))
    found: list[tuple[Page, Buffers]] = []
    start = 0
    for page, size in zip(pages, sizes, strict=True):
        end = start + size * page.shards
        found.append((page, [memory[at : at + size] for at in range(start, end, size)]))
        start = end
    return found
