"""Which holders have which blocks: chained hash -> the set of its holders, as a bitmask. Pure.

A holder is a small number: one place where blocks lie. A hash stands for its block and all before it.
"""

from collections.abc import Sequence


class Index:
    """Leading blocks of a prompt by holder."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def store(self, holder: int, parent: int | None, hashes: Sequence[int]) -> None:
        bit, holders = 1 << holder, self._holders
        for block in hashes:
            holders[block] = holders.get(block, 0) | bit

    def remove(self, holder: int, hashes: Sequence[int]) -> None:
        bit, holders = 1 << holder, self._holders
        for block in hashes:
            left = holders.get(block, 0) & ~bit
            if left:
                holders[block] = left
            else:
                holders.pop(block, None)

    def clear(self, holder: int) -> None:
        self.remove(holder, list(self._holders))

    def match(self, chain: Sequence[int]) -> dict[int, int]:
        """Holder -> how many leading blocks it has, if any."""
        found: dict[int, int] = {}
        left = -1
        for depth, block in enumerate(chain):
            mask = self._holders.get(block, 0) & left
            if mask != left and depth:
                _note(left & ~mask, depth, found)
            left = mask
            if not left:
                break
        else:
            if chain:
                _note(left, len(chain), found)
        return found


def _note(mask: int, depth: int, found: dict[int, int]) -> None:
    while mask:
        lowest = mask & -mask
        found[lowest.bit_length() - 1] = depth
        mask ^= lowest
