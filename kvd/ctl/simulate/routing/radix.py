"""A worker's prefix cache: whole blocks, the least recently used leaves first. Pure: no clock.

A block's id stands for the block and all before it, so a chain of ids is a path from the root. What a request uses is
held and cannot leave. Touched blocks are put in line deepest first, so the head of the line is always a leaf.

Always true: `used` is at most `capacity`; blocks that are held are not in line; who holds a block holds its ancestors.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice, takewhile


class Radix:
    """Places for `capacity` blocks, those of cached prefixes and those that nobody may share counted alike."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.private = 0  # blocks of running requests that are in no shared prefix
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached and held by nobody, next to leave first
        self._held: dict[int, int] = {}  # cached -> by how many

    @property
    def used(self) -> int:
        return len(self._idle) + len(self._held) + self.private

    @property
    def claimed(self) -> int:
        """Blocks that cannot leave."""
        return len(self._held) + self.private

    def match(self, chain: Sequence[int]) -> int:
        """How many leading blocks are cached."""
        idle, held = self._idle, self._held
        return sum(1 for _ in takewhile(lambda block: block in held or block in idle, chain))

    def hold(self, chain: Sequence[int], blocks: int) -> None:
        """The first `blocks` of the chain, which are cached, stay until they are let go."""
        idle, held = self._idle, self._held
        for block in islice(chain, blocks):
            if block in held:
                held[block] += 1
            else:
                del idle[block]
                held[block] = 1

    def let_go(self, chain: Sequence[int], blocks: int) -> None:
        """One holder less."""
        held = self._held
        for at in range(blocks - 1, -1, -1):
            block = chain[at]
            if held[block] > 1:
                held[block] -= 1
            else:
                del held[block]
                self._idle[block] = None

    def take(self, blocks: int) -> list[int] | None:
        """Room for so many private blocks: the ids of those that left for it, or None where it cannot be had."""
        missing = self.used + blocks - self.capacity
        if missing > len(self._idle):
            return None
        gone = [self._idle.popitem(last=False)[0] for _ in range(missing)]
        self.private += blocks
        return gone

    def free(self, blocks: int) -> None:
        """Private blocks that are not needed any more."""
        self.private -= blocks

    def share(self, chain: Sequence[int], first: int, last: int) -> list[int]:
        """Private blocks first..last of a chain whose blocks before are held become cached, and held.

        Returns those that were not cached yet; where another request was faster, the copy is freed.
        """
        fresh = [block for block in chain[first:last] if block not in self._held and block not in self._idle]
        for block in fresh:
            self._idle[block] = None
        self.hold(chain[first:last], last - first)
        self.private -= last - first
        return fresh
