"""Stamps order what nodes do to a shared tier, and say how old a page is. Pure.

A stamp is the milliseconds since 1970 in the upper bits and a counter in the lower 20. A node's next stamp is above
all it has seen, its own and others' (a Lamport clock), so a put after a remove is after it, whatever the clocks say.
Nodes whose clocks differ by d may, within d, order a put and a remove of one page wrongly: then the page is gone.
"""

from typing import Final

COUNTER_BITS: Final = 20


class Stamps:
    def __init__(self) -> None:
        self._last = 0

    def next(self, now_s: float) -> int:
        self._last = max(at(now_s), self._last + 1)
        return self._last

    @property
    def last(self) -> int:
        return self._last

    def saw(self, stamp: int) -> None:
        self._last = max(self._last, stamp)


def at(now_s: float) -> int:
    """The first stamp of a moment; 0 for what is before 1970."""
    return max(0, int(now_s * 1000)) << COUNTER_BITS
