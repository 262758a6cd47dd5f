"""Runs: stretches of a chain whose blocks lie in the same places, kept as one record each; and where each block is.

A tree: a run's parent is the run whose last block comes before its first. Holders are bits of a run's mask, so what
a thousand blocks share is written once, and a run tells how deep its blocks are without asking each of them.

    shards      hash >> 56 -> {hash & LOW: run}    lossless; a dict that grows or is compacted stops the program for
                                                   1/256 of the time
    columns     one entry a run: blocks, masks, parents, kids, last

Run numbers, not objects, are the values: a dict of plain integers is nothing to the garbage collector.

This module decides nothing: it does not know what a holder is, nor when blocks should leave.
Always true: a block is in one run; a run that is in use has blocks; a run whose parent is UNKNOWN is one block that
nobody holds, known by name because a child of it came first.
"""

import sys
from array import array
from collections.abc import Sequence

ROOT, UNKNOWN, FREE = -1, -2, -3  # parents that are no runs: none was named; not yet known; not in use
LOW = (1 << 60) - 1  # 60 bits take 32 bytes instead of 48. Shifted down they do not: room is made before the shift
_SHARDS = 256  # found by the upper 8 bits, of which a negative number's count from the end
_TOPS = slice(7 if sys.byteorder == "little" else 0, None, 8)  # of an array's bytes: each block's upper 8 bits
_EMPTY = array("q")


class Runs:
    """The tree and its table. Callers read the columns; what changes them is here. Nothing blocks."""

    def __init__(self) -> None:
        self.shards: list[dict[int, int]] = [{} for _ in range(_SHARDS)]
        self.blocks: list[array[int]] = []  # hashes, in the order of the chain
        self.masks: list[int] = []
        self.parents = array("i")
        self.kids = array("i")  # how many runs have this one as parent
        self.last = array("i")  # one that had it: the only child, where `kids` is 1 and it still says so
        self.count = 0  # blocks
        self.childless: list[int] = []  # runs that lost their last child and that nobody holds: for whoever sweeps
        self.reuse = (
            True  # False while a sweep goes over the numbers upwards: new runs then come where it is yet to go
        )
        self._free: list[int] = []

    def get(self, block: int) -> int | None:
        """The run that has this block."""
        return self.shards[block >> 56].get(block & LOW)

    def used(self) -> int:
        """How many runs there are."""
        return len(self.blocks) - len(self._free)

    def offset(self, run: int, block: int, near: int) -> int:
        """Where in its run a block is. Looked for among the last `near` first: most of what is asked for is there."""
        blocks = self.blocks[run]
        if blocks[-1] == block:
            return len(blocks) - 1
        if blocks[0] == block:
            return 0
        if near < len(blocks):
            try:
                return blocks.index(block, len(blocks) - near)
            except ValueError:
                pass
        return blocks.index(block)

    def only_child(self, run: int) -> int | None:
        """The child of a run that has one, where it is still known which."""
        child = self.last[run]
        return child if self.kids[run] == 1 and self.parents[child] == run else None

    def oldest(self, run: int) -> int:
        """The run at the top of this one's tree."""
        while (parent := self.parents[run]) >= 0:
            run = parent
        return run

    def start(self, parent: int, mask: int, blocks: "array[int]") -> tuple[int, int]:
        """A run below `parent` with these blocks, up to the first that is known already, which is not the very first.
        Returns it, and how many they are. It keeps the array."""
        run = self._new(parent, mask)
        if len(blocks) == 1:
            (block,) = blocks
            self.shards[block >> 56][block & LOW] = run
            self.blocks[run] = blocks
            self.count += 1
            return run, 1
        added = self._enter(run, blocks)
        self.blocks[run] = blocks if added == len(blocks) else blocks[:added]
        return run, added

    def attach(self, run: int, parent: int) -> None:
        """Put a run that has no parent yet, or an UNKNOWN one, below another's last block."""
        self.parents[run] = parent
        if parent >= 0:
            self.kids[parent] += 1
            self.last[parent] = run

    def add(self, run: int, blocks: "array[int]") -> int:
        """Append blocks to a run without children, up to the first that is known already. Returns how many."""
        added = self._enter(run, blocks)
        self.blocks[run].extend(blocks if added == len(blocks) else blocks[:added])
        return added

    def cut(self, run: int, count: int) -> None:
        """Forget the last blocks of a run without children; the run with them where they are all."""
        blocks = self.blocks[run]
        keep = len(blocks) - count
        shards = self.shards
        for block in blocks[keep:]:
            del shards[block >> 56][block & LOW]
        del blocks[keep:]
        self.count -= count
        if not keep:
            parent = self.parents[run]
            self._release(run)
            if parent >= 0:
                self.kids[parent] -= 1
                if not self.kids[parent] and not self.masks[parent]:
                    self.childless.append(parent)

    def split(self, run: int, at: int) -> tuple[int, int]:
        """Two runs instead of one, the first with `at` blocks. Costs the shorter part, or the first where the run has
        several children: those would have to be found."""
        child = self.only_child(run)
        blocks = self.blocks[run]
        if (child is not None or not self.kids[run]) and len(blocks) - at <= at:
            tail = self._new(FREE, self.masks[run])
            self._renumber(blocks[at:], tail)
            self.blocks[tail] = blocks[at:]
            del blocks[at:]
            self.parents[tail] = run
            self.kids[tail], self.kids[run] = self.kids[run], 1
            self.last[run] = tail
            if child is not None:
                self.last[tail] = child
                self.parents[child] = tail
            return run, tail
        head = self._new(FREE, self.masks[run])
        self._renumber(blocks[:at], head)
        self.blocks[head] = blocks[:at]
        self.blocks[run] = blocks[at:]
        self._take_place(head, run)
        self.parents[run] = head
        self.kids[head], self.last[head] = 1, run
        return head, run

    def rise(self, run: int, count: int) -> bool:
        """Move a run's first blocks to the end of its parent, whose only child it is. False where that cannot be:
        all blocks, and several children that would have to be found."""
        parent = self.parents[run]
        blocks = self.blocks[run]
        if count == len(blocks):
            child = self.only_child(run)
            if self.kids[run] and child is None:
                return False
            self._renumber(blocks, self._number(parent))
            self.blocks[parent].extend(blocks)
            self.kids[parent] = self.kids[run]
            if child is not None:
                self.parents[child] = parent
                self.last[parent] = child
            self._release(run)
        else:
            moved = blocks[:count]
            self._renumber(moved, self._number(parent))
            self.blocks[parent].extend(moved)
            self.blocks[run] = blocks[count:]
        return True

    def sink(self, run: int, count: int, child: int) -> None:
        """Move a run's last blocks to the beginning of its only child."""
        blocks = self.blocks[run]
        keep = len(blocks) - count
        moved = blocks[keep:]
        self._renumber(moved, self._number(child))
        self.blocks[child] = moved + self.blocks[child]
        if keep:
            del blocks[keep:]
        else:
            self._take_place(child, run)
            self._release(run)

    def faults(self) -> list[str]:
        """What is not as it must always be. Goes over everything: for tests."""
        wrong = []
        kids = [0] * len(self.blocks)
        seen = 0
        for run, blocks in enumerate(self.blocks):
            parent = self.parents[run]
            if (parent == FREE) == bool(blocks):
                wrong.append(f"run {run} has {len(blocks)} blocks and parent {parent}")
            wrong += [f"block {block} of run {run} is elsewhere" for block in blocks if self.get(block) != run]
            if parent == UNKNOWN and (len(blocks) != 1 or self.masks[run]):
                wrong.append(f"run {run} is held and has no parent")
            if parent >= 0:
                kids[parent] += 1
            seen += len(blocks)
        if not seen == self.count == sum(map(len, self.shards)):
            wrong.append(f"{seen} blocks in runs, {self.count} counted, {sum(map(len, self.shards))} in the table")
        return wrong + [f"run {run} has {n} children" for run, n in enumerate(kids) if n != self.kids[run]]

    def _new(self, parent: int, mask: int) -> int:
        """A run without blocks below `parent`, or FREE: the caller adds some, and a parent, at once."""
        if self._free and self.reuse:
            run = self._free.pop()
            self.masks[run] = mask
            self.parents[run] = parent
        else:
            run = len(self.blocks)
            self.blocks.append(_EMPTY)
            self.masks.append(mask)
            self.kids.append(0)
            self.parents.append(parent)
            self.last.append(FREE)
        if parent >= 0:
            self.attach(run, parent)
        return run

    def _enter(self, run: int, blocks: "array[int]") -> int:
        """Into the table, up to the first that is known already. Returns how many."""
        shards = self.shards
        added = 0
        for top, block in zip(blocks.tobytes()[_TOPS], blocks, strict=True):
            shard = shards[top]
            key = block & LOW
            if key in shard:
                break
            shard[key] = run
            added += 1
        self.count += added
        return added

    def _take_place(self, run: int, of: int) -> None:
        """Below its parent; `of` is another's child from now on, or none's."""
        parent = self.parents[run] = self.parents[of]
        if parent >= 0:
            self.last[parent] = run

    def _number(self, run: int) -> int:
        """The integer that its blocks have already: one object for all of them, where any other would be 32 bytes."""
        block = self.blocks[run][0]
        return self.shards[block >> 56][block & LOW]

    def _renumber(self, blocks: Sequence[int], run: int) -> None:
        shards = self.shards
        for block in blocks:
            shards[block >> 56][block & LOW] = run

    def _release(self, run: int) -> None:
        self.blocks[run], self.masks[run], self.kids[run] = _EMPTY, 0, 0
        self.parents[run] = self.last[run] = FREE
        self._free.append(run)
