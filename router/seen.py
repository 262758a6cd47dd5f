"""Which blocks were asked for lately, in fixed memory: two Bloom filters, the older one forgotten in turn. Pure.

Chains are noted whole, so whoever has a block has those before it: where a chain stops being known is searched for,
not walked to, and only what follows is noted.

A block that was noted less than `capacity` notes ago is found; one that never was is found once in about a hundred
times, and what depends on it (the blocks before it count as known too) is as rare.
"""

from array import array
from collections.abc import Sequence
from typing import Final

_BLOCKS_PER_WORD: Final = 4
_MIX: Final = 0x9E3779B97F4A7C15  # hashes of tests and traces are small numbers
_WORD: Final = (1 << 64) - 1


def _mask(number: int) -> int:
    """Four bits of a word, or three where two fall together."""
    mixed = (number + 1) * _MIX & _WORD
    mixed = (mixed ^ mixed >> 29) * _MIX & _WORD
    return 1 << (mixed >> 58) | 1 << (mixed >> 52 & 63) | 1 << (mixed >> 46 & 63) | 1 << (mixed >> 40 & 63)


_MASKS: Final = tuple(_mask(number) for number in range(1 << 12))  # a filter that costs one look instead of four


class Seen:
    """Notes blocks by their hashes; `capacity` * 4 bytes."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._capacity = capacity
        self._words = capacity // _BLOCKS_PER_WORD + 1
        self._now, self._before = self._empty(), self._empty()
        self._noted = 0

    def note(self, chain: Sequence[int], guess: int = 0) -> int:
        """These are asked for now. How many blocks from the first on had been noted lately: about `guess`, perhaps."""
        here = known = self._known(self._now, chain, guess)
        if here < len(chain) and self._in(self._before, chain[here]):
            known = self._known(self._before, chain, here + 1)
        if self._noted >= self._capacity:
            self._now, self._before, self._noted, here = self._empty(), self._now, 0, 0
        for block in chain[here:]:
            at, mask = self._place(block)
            self._now[at] |= mask
            self._noted += 1
        return known

    def _known(self, words: "array[int]", chain: Sequence[int], guess: int) -> int:
        """How many leading blocks are in: in steps that double, then halve, from `guess` on if those are in."""
        place, whole = self._place, len(chain)
        low, step = 0, 1  # all below `low` are in
        if 0 < guess <= whole and self._in(words, chain[guess - 1]):
            low = guess
        while low + step <= whole:
            at, mask = place(chain[low + step - 1])
            if words[at] & mask != mask:
                break
            low += step
            step *= 2
        high = min(whole, low + step - 1)  # what begins there is not
        while low < high:
            middle = (low + high + 1) // 2
            at, mask = place(chain[middle - 1])
            if words[at] & mask == mask:
                low = middle
            else:
                high = middle - 1
        return low

    def _in(self, words: "array[int]", block: int) -> bool:
        at, mask = self._place(block)
        return words[at] & mask == mask

    def _place(self, block: int) -> tuple[int, int]:
        mixed = block * _MIX & _WORD
        return (mixed >> 32) % self._words, _MASKS[(mixed >> 12 ^ mixed >> 44) & 0xFFF]

    def _empty(self) -> "array[int]":
        return array("Q", bytes(8 * self._words))
