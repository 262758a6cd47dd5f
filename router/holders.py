"""Holders as bits of a mask: who is which bit, and when a bit may be used again.

A holder that is cleared loses its bit at once and gets another when it next has something: so nothing has to be
changed wherever the old bit stands. Retired bits are taken out by sweeps, several at a time, and are then free again.
Always true: a live bit belongs to one holder, and no bit is given out while a sweep has not been past it.
"""

from itertools import compress

_DECODED = 4096  # sets of holders that are remembered as such


class Holders:
    """Holder (a small int) <-> bit. As many bits as there ever were holders at once, cleared and not yet swept ones
    included."""

    def __init__(self) -> None:
        self.live = 0  # the bits of all holders
        self.sweeping = 0  # bits that the sweep under way takes out
        self._retired = 0  # and those that wait for the next
        self._bits: dict[int, int] = {}
        self._names: list[int] = []  # number of the bit -> holder
        self._unused: list[int] = []
        self._decoded: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._bits)

    def bit(self, holder: int) -> int:
        """The holder's bit, 0 where it has none."""
        return self._bits.get(holder, 0)

    def join(self, holder: int) -> int:
        """A bit for a holder that has none."""
        if self._unused:
            bit = self._unused.pop()
            self._names[bit.bit_length() - 1] = holder
            self._decoded.clear()
        else:
            bit = 1 << len(self._names)
            self._names.append(holder)
        self._bits[holder] = bit
        self.live |= bit
        return bit

    def retire(self, holder: int) -> None:
        """The holder has nothing any more; its bit, if it has one, waits for a sweep."""
        bit = self._bits.pop(holder, 0)
        self.live &= ~bit
        self._retired |= bit

    def start_sweep(self) -> bool:
        """Whether there are bits to take out; `sweeping` says which."""
        self.sweeping, self._retired = self._retired, 0
        return self.sweeping != 0

    def end_sweep(self) -> None:
        """No mask has a bit of `sweeping` any more."""
        self._unused += [1 << number for number in range(len(self._names)) if self.sweeping >> number & 1]
        self.sweeping = 0

    def named(self, mask: int) -> list[int]:
        """The holders of a mask of live bits, one at least. The list is not the caller's to change."""
        if not mask & (mask - 1):
            return [self._names[mask.bit_length() - 1]]
        found = self._decoded.get(mask)
        if found is None:
            if len(self._decoded) >= _DECODED:
                self._decoded.clear()
            found = list(compress(self._names, map("1".__eq__, reversed(f"{mask:b}"))))
            self._decoded[mask] = found
        return found
