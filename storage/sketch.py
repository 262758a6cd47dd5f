"""How often keys were seen lately, in a byte or two per key. Pure and deterministic.

Two generations of small counters, two counters a key. When a generation has met its share of keys it becomes the
elder, and the elder is forgotten: so what is remembered spans between one share and two. Counts are never too low
within that span, and seldom too high.
"""

MOST = 3  # counters stop here
_LEAST_BITS, _MOST_BITS = 20, 25  # 2 and 64 MiB: the largest remembers two million pages at least
_ROOM = 16  # counters per key
_MIX = 0x9E3779B97F4A7C15  # the golden ratio: spreads keys that are small numbers
_WORD = (1 << 64) - 1


class Sketch:
    """Counts of keys, for a tier of so many pages."""

    def __init__(self, places: int) -> None:
        self._bits = min(max(_LEAST_BITS, (_ROOM * places - 1).bit_length()), _MOST_BITS)
        self._mask = (1 << self._bits) - 1
        self._young = bytearray(1 << self._bits)
        self._elder = bytes(1 << self._bits)
        self._met = 0

    def count(self, key: int) -> int:
        """How often the key was seen, up to MOST."""
        mixed = key * _MIX & _WORD
        mixed ^= mixed >> 32
        first, second = mixed & self._mask, mixed >> (64 - self._bits)
        return max(min(self._young[first], self._young[second]), min(self._elder[first], self._elder[second]))

    def add(self, key: int) -> int:
        """See the key once more; how often it had been seen before, up to MOST."""
        mixed = key * _MIX & _WORD
        mixed ^= mixed >> 32
        first, second = mixed & self._mask, mixed >> (64 - self._bits)
        young, elder = self._young, self._elder
        one, other = young[first], young[second]
        recent = one if one < other else other  # min() takes as long as all the rest
        before = recent
        if before < MOST and elder[first] > before and elder[second] > before:
            before = min(elder[first], elder[second])
        after = before + 1 if before < MOST else MOST
        if after > recent:
            if after > one:
                young[first] = after
            if after > other:
                young[second] = after
            if not recent:
                self._meet()
        return before

    def _meet(self) -> None:
        self._met += 1
        if self._met * _ROOM > self._mask:
            self._elder, self._young, self._met = bytes(self._young), bytearray(len(self._young)), 0
