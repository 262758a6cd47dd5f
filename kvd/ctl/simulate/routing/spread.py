"""Durations by how often they came, to about one per cent: percentiles of millions in a few hundred counts. Pure."""

from dataclasses import dataclass, field
from math import exp, log
from typing import Final

_STEP: Final = log(1.01)


@dataclass(slots=True)
class Spread:
    """Counts by the logarithm of the duration, which is in seconds and above zero."""

    count: int = 0
    total: float = 0.0
    _counts: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float, count: int = 1) -> None:
        if count <= 0:
            return
        self.count += count
        self.total += seconds * count
        place = round(log(max(seconds, 1e-9)) / _STEP)
        self._counts[place] = self._counts.get(place, 0) + count

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def at(self, part: float) -> float:
        """The duration that `part` of all are at most."""
        left = part * self.count
        for place in sorted(self._counts):
            left -= self._counts[place]
            if left <= 0:
                return exp(place * _STEP)
        return 0.0
