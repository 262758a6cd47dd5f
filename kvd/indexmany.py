"""Many entries of the lookup index at a time, as arrays, for what tiers below RAM say of thousands of pages at once.

The writer's alone, and only where there is a lower tier: it needs numpy. The table, its limits and what readers may
see meanwhile are as `kvd.index` has them; above all, name_hi is stored last. Decides nothing about pages in RAM.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvd.index import ENTRY_WORDS, HEADER_WORDS, LOWER, MAX_PROBES, WITHDRAWN

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_NAME_WORDS: Final = 6  # namespace 2, page key 4
_ROUNDS: Final = 8  # two or three do; names chosen to collide take one each


class Entered(NamedTuple):
    """What came of a batch."""

    new: int  # entries that were taken for them
    refused: int  # names that are not in the table, which is full
    left: list[int]  # names, by position, that are not: in RAM, or in each other's way; one by one it will be seen


class Names(NamedTuple):
    """Names as the index knows them, and where each one's probes begin."""

    hi: Words
    lo: Words
    slot: Places

    def of(self, which: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "Names":
        return Names(self.hi[which], self.lo[which], self.slot[which])


def enter(words: memoryview, names: Sequence[bytes], tier: int, full: bool) -> Entered:
    """Show that a tier (its bit) holds pages (namespace + key). The table has room for all of them, or is full."""
    entries = _entries(words)
    wanted = _names(names, len(entries) - 1)
    pending = np.arange(len(names))
    left: list[int] = []
    new = 0
    for _ in range(_ROUNDS):
        if not len(pending):
            break
        at, free = _find(entries, wanted.of(pending))
        lower = (at >= 0) & (entries[at, 2] >= LOWER)
        entries[at[lower], 2] |= np.uint64(tier)  # one store each: readers see the old tiers or the new
        if full:
            return Entered(0, int((at < 0).sum()), pending[(at >= 0) & ~lower].tolist())
        absent = (at < 0) & (free >= 0)
        left += pending[~lower & ~absent].tolist()
        pending, free = pending[absent], free[absent]
        _, first = np.unique(free, return_index=True)  # who comes first takes it, the others look again
        _publish(entries, free[first], wanted.of(pending[first]), tier)
        new += len(first)
        pending = np.delete(pending, first)
    return Entered(new, 0, left + pending.tolist())


def withdraw(words: memoryview, tier: int) -> int:
    """A tier (its bit) holds nothing any more, as far as is known. How many entries are gone with that."""
    entries = _entries(words)
    lower = (entries[:, 0] > WITHDRAWN) & (entries[:, 2] >= LOWER)
    entries[lower, 2] &= ~np.uint64(tier)
    gone = lower & (entries[:, 2] == LOWER)
    entries[gone, 0] = WITHDRAWN
    return int(gone.sum())


def _entries(words: memoryview) -> Words:
    return np.frombuffer(words, np.uint64)[HEADER_WORDS:].reshape(-1, ENTRY_WORDS)


def _names(names: Sequence[bytes], mask: int) -> Names:
    parts = np.frombuffer(b"".join(names), ">u8").reshape(-1, _NAME_WORDS)
    hi, lo = (parts[:, at].astype(np.uint64) ^ parts[:, at + 2].astype(np.uint64) for at in (0, 1))
    return Names(np.where(hi > WITHDRAWN, hi, hi + np.uint64(2)), lo, (hi & np.uint64(mask)).astype(np.int64))


def _find(entries: Words, wanted: Names) -> tuple[Places, Places]:
    """For each name its entry, and the first entry that could take it; -1 where there is none within reach."""
    at, free = np.full(len(wanted.hi), -1), np.full(len(wanted.hi), -1)
    looking = np.arange(len(wanted.hi))
    hi, lo, slot = wanted
    for _ in range(MAX_PROBES):
        seen = entries[slot, 0]
        here = seen == hi
        here[here] = entries[slot[here], 1] == lo[here]
        at[looking[here]] = slot[here]
        usable = (seen <= WITHDRAWN) & (free[looking] < 0)
        free[looking[usable]] = slot[usable]
        on = ~here & (seen != 0)
        looking, hi, lo, slot = looking[on], hi[on], lo[on], (slot[on] + 1) & (len(entries) - 1)
        if not len(looking):
            break
    return at, free


def _publish(entries: Words, at: Places, names: Names, tier: int) -> None:
    entries[at, 1] = names.lo
    entries[at, 2] = LOWER | tier
    entries[at, 3] = 0
    entries[at, 0] = names.hi
