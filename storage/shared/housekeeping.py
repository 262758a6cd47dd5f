"""What a node does for a shared tier now and then: age-out, merging, and sweeping up after crashes.

A new file is published before the old ones go, and those go only after they were seen to hold nothing that counts for
a grace period: who still reads them by an old index finds them, or finds them gone, which is a miss. "Seen for" is by
this process's own clock, so no other machine's clock and no file time can delete anything. A crash in between leaves
both files, and then the next start finds the old one dead.
"""

import mmap
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvd.storage.quota import Share
from kvd.storage.shared import compaction, makingroom
from kvd.storage.shared.sealed import ALIGN
from kvd.storage.shared.sharedfiles import SharedFiles
from kvd.storage.shared.stamps import at
from kvd.storage.tier import Buffers, Name, Page

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

    def step(self) -> None:
        """All that is due, but at most one file is written. Raises TierError."""
        if self.ttl_s is not None:
            with self.files.lock:
                self.files.changes.left(self.files.copies.expire(at(time.time() - self.ttl_s)))
        self._sweep()
        self._merge_pages()
        self._merge_graves()

    def make_room(self, tenant: str, needed_bytes: int) -> bool:
        """Delete files, so that so many bytes of the tenant's fit the quota. False when they cannot."""
        if needed_bytes > self.quota_bytes:
            return False
        with self.files.lock:
            excess = self.files.bytes_used + needed_bytes - self.quota_bytes
            there = self.files.copies.files.values()
            chosen = makingroom.victims(there, self.shares, tenant, needed_bytes, excess)
        if chosen is None:
            return False
        for file in chosen:
            self.files.counters["evicted files"] += 1
            self.files.delete(file.path)
        return self.files.bytes_used + needed_bytes <= self.quota_bytes

    def _sweep(self) -> None:
        """Files that hold nothing any more: ours soon; those of other nodes, which may be gone, later."""
        mine = f"{self.files.node}/"
        with self.files.lock:
            dead = [file.path for file in self.files.copies.files.values() if not file.live_rows]
            dead += [path for path, said in self.files.graves.items() if self._outlived(path, said)]
            wait = {path: self.grace_s if path.startswith(mine) else self.leftover_s for path in dead}
            wait |= dict.fromkeys(self.files.leftovers, self.leftover_s)
        now = time.monotonic()
        self._since = {path: self._since.get(path, now) for path in wait}
        for path, since in self._since.items():
            if now - since >= wait[path]:
                self.files.counters["swept files"] += 1
                self.files.delete(path)

    def _outlived(self, path: str, said: Iterable[Name]) -> bool:
        """Graves that hide nothing. Looked at once they are old, and then every time: they are few."""
        stamp = int(path.rpartition("/")[2][:16], 16)
        return stamp < at(time.time() - _YOUNG_GRAVE_S) and not self.files.copies.needed(said)

    def _merge_pages(self) -> None:
        with self.files.lock:
            own = [file for path, file in self.files.copies.files.items() if path.startswith(f"{self.files.node}/")]
            chosen = compaction.next_merge(own, self.file_bytes)
            rows = [row for file in chosen for row in self.files.copies.live(file)]
        if not rows:
            return
        moved: list[tuple[Page, Buffers]] = []
        stamps: list[int] = []
        wanted = [(row.page.name, _buffers(row.page)) for row in rows]
        for row, (_, buffers) in zip(self.files.fetch(wanted), wanted, strict=True):
            if row is not None:
                moved.append((row.page, buffers))
                stamps.append(row.stamp)
        if moved and self.files.store(moved, stamps, chosen[0].tenant, self._fits):
            self.files.counters["merged files"] += len(chosen)

    def _fits(self, size: int) -> bool:
        """A merge may not evict for its own sake."""
        return self.files.bytes_used + size <= self.quota_bytes

    def _merge_graves(self) -> None:
        with self.files.lock:
            own = {path: said for path, said in self.files.graves.items() if path.startswith(f"{self.files.node}/")}
            if len(own) <= _GRAVE_FILES:
                return
            together: dict[Name, int] = {}
            for said in own.values():
                for name, stamp in said.items():
                    together[name] = max(stamp, together.get(name, -1))
            needed = self.files.copies.needed(together)
        young = at(time.time() - _YOUNG_GRAVE_S)
        if kept := {name: stamp for name, stamp in together.items() if stamp >= young or name in needed}:
            self.files.bury(kept)
        for path in own:
            self.files.delete(path)


def _buffers(page: Page) -> list[memoryview]:
    size = -(-page.length // ALIGN) * ALIGN
    return [memoryview(mmap.mmap(-1, size)) for _ in range(page.shards)]
