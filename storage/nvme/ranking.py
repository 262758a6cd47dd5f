"""Which slots hold what is worth least, for 10**6 pages at a time. Pure.

The judge is in another process: what it has learnt comes as one density per kind and age (see kvd.storage.worth), and
each slot knows its page's kind and when it was last used. Until it has said anything, the older use leaves first.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvd.storage.reuse import AGES
from kvd.storage.worth import DEPTHS, KINDS, Worth, depth_of

Numbers = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.uint8]  # as kvd.storage.worth knows them
Times = npt.NDArray[np.int64]  # milliseconds since 1970
Densities = npt.NDArray[np.float64]
_TIME_BITS, _DEPTH_BITS = 42, 3


class Ranking:
    """One lesson, as arrays by line: kind * AGES + age."""

    def __init__(self, density: Sequence[float] = ()) -> None:
        """Raises ValueError where there is not one density for each line."""
        given = np.array(density or Worth(1).ranks.density)
        if given.shape != (KINDS * AGES,):
            raise ValueError(f"{given.size} densities instead of {KINDS * AGES}")
        self._density = given
        self._rank = np.unique(given, return_inverse=True)[1].astype(np.int64)

    def order(self, kinds: Kinds, used_at: Times, now: int) -> Numbers:
        """What to sort pages by: the least density first, then the oldest use, then what is deepest in its chain."""
        order: Numbers = self._rank[_lines(kinds, used_at, now)] << _TIME_BITS | used_at
        order = order << _DEPTH_BITS | DEPTHS - 1 - depth_of(kinds).astype(np.int64)
        return order

    def density(self, kinds: Kinds, used_at: Times, now: int) -> Densities:
        """Expected uses per second."""
        return self._density[_lines(kinds, used_at, now)]


def _lines(kinds: Kinds, used_at: Times, now: int) -> Numbers:
    seconds = np.maximum(now - used_at, 0) / 1000
    lines: Numbers = np.minimum(kinds, KINDS - 1).astype(np.int64) * AGES
    lines += np.minimum(np.log2(seconds + 1).astype(np.int64), AGES - 1)
    return lines
