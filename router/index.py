"""Index: which holders have how many leading blocks of a prompt.

A holder is one place where blocks lie: the GPU of one rank, or a tier of one node. What each of them said it stored
and removed is kept exactly, whatever order that came in: holders with holes in the middle, children before parents.

    match     exact for chained hashes (equal hashes mean equal prefixes: sglang.md 4.4): per holder, the number of
              blocks from the first on that it has, no hole before them. It takes one step per run on the way
              (`runs`) and a binary search at forks; nothing in it relies on a holder having no holes, or on its
              knowing parents: a block told without one lies where any other holder says. A holder that names wrong
              parents may be credited with other blocks than it claims, never with more of them, and so may by its
              doing those that name none; others may get less by it, or be refused (see bounded), never more.
    bounded   by `max_blocks` altogether and by `limit` per holder. Who goes beyond, or contradicts what is known (one
              block under two parents that were named: hashes collided, or a peer errs), is not exact from then on:
              nothing new is taken from it until it is cleared, what it had stays, and `match` says at most the truth.
    clear     at once: the holder's bit is retired, and swept from the runs a little with every store and clear.

No clock, no I/O, no thread: one owner calls it.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from kvd.router.holders import Holders
from kvd.router.marking import give, leading, take
from kvd.router.runs import LOW, Runs

_SWEPT_PER_STORE = 64  # besides two for each block stored, so that a sweep ends before as much again can come
_CLEARS_PER_SWEEP = 64  # a sweep is over after twice as many, or so many bits would wait for one as holders leave


@dataclass(frozen=True, slots=True)
class IndexStats:
    """`blocks` are distinct ones, in `runs` runs; `inexact` holders are not exact; `sweeping`: see `sweep`."""

    blocks: int
    runs: int
    holders: int
    inexact: int
    sweeping: bool


class Index:
    """Where blocks lie. Hashes are SGLang's event block hashes: signed 64-bit integers."""

    def __init__(self, max_blocks: int) -> None:
        assert max_blocks > 0
        self.max_blocks = max_blocks
        self._runs = Runs()
        self._holders = Holders()
        self._held: dict[int, int] = {}  # holder -> how many blocks it has
        self._limits: dict[int, int] = {}
        self._inexact: set[int] = set()
        self._cursor = 0  # the run that the sweep under way comes to next

    def limit(self, holder: int, blocks: int) -> None:
        """The most blocks that this holder can have: its pool, as it reports it. Without one it is `max_blocks`."""
        self._limits[holder] = blocks

    def exact(self, holder: int) -> bool:
        """Whether everything that the holder said since its last clear is in here."""
        return holder not in self._inexact

    def inexact(self) -> list[int]:
        """The holders that are not exact."""
        return list(self._inexact)

    def held(self, holder: int) -> int:
        """How many blocks the holder has."""
        return self._held.get(holder, 0)

    def store(self, holder: int, parent: int | None, hashes: Sequence[int]) -> bool:
        """The holder has these consecutive blocks; `parent` comes before the first, None where nothing is known to.

        Returns `exact(holder)`: once that is False the holder has to be cleared and told anew. Raises OverflowError
        or TypeError, and changes nothing, where a hash is no signed 64-bit integer.
        """
        blocks = array("q", hashes)
        before = None if parent is None else array("q", (parent,))[0]
        self._sweep_for(1, len(blocks))
        if holder in self._inexact or not blocks:
            return holder not in self._inexact
        bit = self._holders.bit(holder) or self._join(holder)
        if self._has_room(blocks) and self._within_limit(holder, bit, blocks):
            gained, whole = give(self._runs, bit, before, blocks)
            self._held[holder] += gained
            if whole:
                return True
        self._inexact.add(holder)
        return False

    def store_all(self, holder: int, stretches: Sequence[tuple[int | None, "array[int]"]]) -> bool:
        """As `store` for each of these, (parent, hashes), in this order: in less time, where most are short.

        The arrays are the index's from now on. Raises nothing: see there for what parents have to be.
        """
        blocks = sum([len(hashes) for _, hashes in stretches])
        runs, held = self._runs, self._held.get(holder, 0)
        roomy = runs.count + blocks + len(stretches) <= self.max_blocks  # each may bring a parent that is unknown
        if not roomy or held + blocks > self._limits.get(holder, self.max_blocks) or holder in self._inexact:
            for parent, hashes in stretches:
                self.store(holder, parent, hashes)
            return holder not in self._inexact
        self._sweep_for(len(stretches), blocks)
        bit = self._holders.bit(holder)
        for parent, hashes in stretches:
            if not hashes:
                continue
            bit = bit or self._join(holder)
            gained, whole = give(runs, bit, parent, hashes)
            held += gained
            if not whole:
                self._inexact.add(holder)
                break
        if bit:
            self._held[holder] = held
        return holder not in self._inexact

    def remove(self, holder: int, hashes: Sequence[int]) -> None:
        """The holder no longer has these blocks, in any order; what it never had is ignored. Raises as `store`."""
        blocks = array("q", hashes)
        bit = self._holders.bit(holder)
        if bit:
            self._held[holder] -= take(self._runs, bit, blocks)

    def clear(self, holder: int) -> None:
        """The holder has nothing, is exact again, and is forgotten until it stores; its limit stays.

        No more than some ms, however much it had: the rest is for `sweep`.
        """
        self._inexact.discard(holder)
        self._held.pop(holder, None)
        self._holders.retire(holder)
        if not self._holders.sweeping:
            self._start_sweep()
        self.sweep(self._runs.count // _CLEARS_PER_SWEEP + _SWEPT_PER_STORE)

    def match(self, chain: Sequence[int]) -> dict[int, int]:
        """Holder -> how many of the chain's leading blocks it has; holders that lack the first are left out."""
        runs = self._runs
        shards, masks, columns = runs.shards, runs.masks, runs.blocks
        named = self._holders.named
        found: dict[int, int] = {}
        live = self._holders.live
        at, total = 0, len(chain) if live else 0
        while at < total:
            block = chain[at]
            run = shards[block >> 56].get(block & LOW)
            if run is None:
                break
            here = live & masks[run]
            if here != live:
                if at:
                    found.update(dict.fromkeys(named(live ^ here), at))
                if not here:
                    return found
                live = here
            blocks = columns[run]
            if blocks[0] != block:
                break  # another was put before it, by a parent named wrongly: no run counts twice
            end = at + len(blocks)
            if end <= total and blocks[-1] == chain[end - 1]:
                at = end
            else:
                at += leading(blocks, chain, at)  # a fork: what follows may be known, but not that it does
        if at:
            found.update(dict.fromkeys(named(live), at))
        return found

    def sweep(self, steps: int) -> bool:
        """Take cleared holders' bits, and blocks that nobody has, out of the table: `steps` blocks or runs of it.

        Returns whether there is more to do. Each store does a part: this only gives the memory back earlier.
        """
        runs = self._runs
        while steps > 0:
            if runs.childless:
                steps -= self._bury(runs.childless.pop(), steps)
            elif not self._holders.sweeping:
                return False
            elif self._cursor < len(runs.masks):
                run, self._cursor = self._cursor, self._cursor + 1
                if runs.masks[run] & self._holders.sweeping:
                    runs.masks[run] &= ~self._holders.sweeping
                    runs.childless.append(run)
                steps -= 1
            else:
                self._holders.end_sweep()
                self._start_sweep()
        return True

    def stats(self) -> IndexStats:
        """Counts, as of now."""
        unswept = bool(self._holders.sweeping or self._runs.childless)
        return IndexStats(self._runs.count, self._runs.used(), len(self._holders), len(self._inexact), unswept)

    def faults(self) -> list[str]:
        """What is not as it must always be. Goes over everything: for tests."""
        runs = self._runs
        held = {holder: 0 for holder in self._held}
        for mask, blocks in zip(runs.masks, runs.blocks, strict=True):
            for holder in self._holders.named(mask & self._holders.live) if mask & self._holders.live else ():
                held[holder] += len(blocks)
        wrong = [
            f"holder {name}: {n} blocks, counted {held[name]}" for name, n in self._held.items() if n != held[name]
        ]
        if runs.count > self.max_blocks:
            wrong.append(f"{runs.count} blocks, more than {self.max_blocks}")
        if not self._holders.sweeping and not runs.childless:
            idle = [run for run, mask in enumerate(runs.masks) if not mask and runs.blocks[run] and not runs.kids[run]]
            wrong += [f"run {run} is nobody's and leads nowhere" for run in idle]
        return wrong + runs.faults()

    def _join(self, holder: int) -> int:
        self._held[holder] = 0
        return self._holders.join(holder)

    def _sweep_for(self, stores: int, blocks: int) -> None:
        """A part of what is to be swept, with each store."""
        if self._holders.sweeping or self._runs.childless:
            self.sweep(2 * blocks + stores * _SWEPT_PER_STORE)

    def _start_sweep(self) -> None:
        self._runs.reuse = not self._holders.start_sweep()
        self._cursor = 0

    def _bury(self, run: int, steps: int) -> int:
        """Forget a run if it is nobody's and has no children, as far as `steps` go. Returns how many it took."""
        runs = self._runs
        length = len(runs.blocks[run])
        if not length or runs.masks[run] or runs.kids[run]:
            return 1
        count = min(steps, length)
        runs.cut(run, count)
        if count < length:
            runs.childless.append(run)
        return count

    def _has_room(self, blocks: Sequence[int]) -> bool:
        """For all of them and one more, because the parent may be unknown."""
        runs = self._runs
        wanted = len(blocks) + 1
        if runs.count + wanted > self.max_blocks:
            self.sweep(8 * wanted)
            wanted -= sum(runs.get(block) is not None for block in blocks)
        return runs.count + wanted <= self.max_blocks

    def _within_limit(self, holder: int, bit: int, blocks: Sequence[int]) -> bool:
        limit = self._limits.get(holder, self.max_blocks)
        held = self._held[holder]
        if held + len(blocks) <= limit:
            return True
        places = (self._runs.get(block) for block in blocks)
        return held + sum(run is None or not self._runs.masks[run] & bit for run in places) <= limit
