"""Which blocks were asked for lately, in fixed memory: two Bloom filters, the older one forgotten in turn. Pure.

A block that was noted less than `capacity` notes ago is always found; one that never was is found once in about a
hundred times.
"""

from collections.abc import Sequence
from typing import Final

_PROBES: Final = 5
_BITS_PER_BLOCK: Final = 12
_MIX: Final = 0x9E3779B97F4A7C15  # hashes of tests and traces are small numbers
_WORD: Final = (1 << 64) - 1


class Seen:
    """Notes blocks by their hashes; `capacity` * 3 bytes."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._capacity = capacity
        self._bits = max(64, capacity * _BITS_PER_BLOCK)
        self._now, self._before = bytearray(self._bits // 8 + 1), bytearray(self._bits // 8 + 1)
        self._noted = 0

    def leading(self, chain: Sequence[int]) -> int:
        """How many blocks from the first on were noted lately."""
        for depth, block in enumerate(chain):
            places = self._places(block)
            if not (_all(self._now, places) or _all(self._before, places)):
                return depth
        return len(chain)

    def note(self, chain: Sequence[int]) -> None:
        """These are asked for now."""
        for block in chain:
            places = self._places(block)
            if _all(self._now, places):
                continue
            for place in places:
                self._now[place >> 3] |= 1 << (place & 7)
            self._noted += 1
            if self._noted >= self._capacity:
                self._now, self._before = bytearray(len(self._now)), self._now
                self._noted = 0

    def _places(self, block: int) -> list[int]:
        mixed = (block * _MIX) & _WORD
        mixed ^= mixed >> 29
        first, step = mixed & 0xFFFFFFFF, (mixed * _MIX & _WORD) >> 32 | 1
        return [(first + step * probe) % self._bits for probe in range(_PROBES)]


def _all(bits: bytearray, places: list[int]) -> bool:
    return all(bits[place >> 3] >> (place & 7) & 1 for place in places)
