"""How fast a lower tier is: bytes a second, and seconds before the first, learnt from its loads. Pure: no clock.

Measured over the time that the tier is busy, in slices; one that begins with an idle tier pays the latency once:

    seconds = latency_s + bytes / bytes_per_s

The recent slices are explained by medians, so that one that something got in the way of changes nothing. Two in a row
that were far from what was expected, in the same direction, are another tier: what was before them is forgotten.
A tier that brings nothing for much longer than expected is silent, until something comes.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from statistics import median
from typing import NamedTuple

_PERIOD_S = 0.05  # of a slice, while loads follow each other
_KEPT = 7  # slices
_OFF = 2.0  # times slower or faster than expected
_APART = 1.5  # sizes that differ by as much tell latency and rate apart
_LATE, _LATE_S = 3.0, 0.5  # times as long as expected, and seconds: who waited so long had better compute


class Slice(NamedTuple):
    """So many bytes came in so many seconds."""

    size: int
    seconds: float
    from_idle: bool


def _recent() -> deque[Slice]:
    return deque(maxlen=_KEPT)


@dataclass(slots=True)
class Disk:
    """What one lower tier was measured to do. `observe` by itself tells it of a measurement made elsewhere."""

    bytes_per_s: float = 0.0  # 0: never measured
    latency_s: float = 0.0
    measured_at: float = 0.0
    on_the_way: int = 0  # bytes
    late_at: float = inf  # when some of them should have come for long
    _since: float = 0.0
    _came: int = 0
    _from_idle: bool = True
    _first: deque[Slice] = field(default_factory=_recent)  # of a busy time
    _following: deque[Slice] = field(default_factory=_recent)
    _odd: tuple[Slice, bool] | None = None  # the last slice, if it was far off, and whether it was slower

    @property
    def known(self) -> bool:
        return self.bytes_per_s > 0

    def begun(self, size: int, now: float) -> None:
        idle = not self.on_the_way
        self.on_the_way += size
        if idle:
            self._since, self._came, self._from_idle = now, 0, True
            self.late_at = self.late(now)

    def ended(self, size: int, came: int, now: float) -> None:
        """`came` of the `size` bytes that were asked for."""
        self.on_the_way -= size
        self._came += came
        self.late_at = self.late(now)
        if (now - self._since >= _PERIOD_S or not self.on_the_way) and self._came and now > self._since:
            self.observe(self._came, now - self._since, now, self._from_idle)
            self._since, self._came, self._from_idle = now, 0, False

    def observe(self, size: int, seconds: float, now: float, from_idle: bool = True) -> None:
        """`size` bytes took so long, the latency included when the tier was idle before."""
        latest = Slice(size, max(seconds, 1e-9), from_idle)
        before, self._odd = self._odd, self._far_off(latest)
        if before is not None and self._odd is not None and before[1] == self._odd[1]:
            self._first.clear()
            self._following.clear()
            self._odd = None
            self._keep(before[0])
        self._keep(latest)
        self.measured_at = now
        self._explain()

    @property
    def doubtful(self) -> bool:
        """The last slice was not what was expected."""
        return self._odd is not None

    def _far_off(self, latest: Slice) -> tuple[Slice, bool] | None:
        if not self.known:
            return None
        expected_s = (self.latency_s if latest.from_idle else 0.0) + latest.size / self.bytes_per_s
        slower = latest.seconds > expected_s
        far = max(latest.seconds, expected_s) > _OFF * min(latest.seconds, expected_s)
        return (latest, slower) if far else None

    def _keep(self, each: Slice) -> None:
        (self._first if each.from_idle else self._following).append(each)

    def _explain(self) -> None:
        per_byte = [each.seconds / each.size for each in self._following]
        per_byte += [
            (a.seconds - b.seconds) / (a.size - b.size)
            for a, b in combinations(self._first, 2)
            if max(a.size, b.size) >= _APART * min(a.size, b.size)
        ]
        slope = median(per_byte) if per_byte else 0.0
        if slope <= 0:
            slope = median(each.seconds / each.size for each in (*self._first, *self._following))
        self.latency_s = median(max(0.0, s.seconds - slope * s.size) for s in self._first) if self._first else 0.0
        self.bytes_per_s = 1 / slope

    def late(self, now: float) -> float:
        """When all that is on the way should have been here for long; never, where that is nothing or not known."""
        if not self.known or not self.on_the_way:
            return inf
        return now + _LATE * (self.latency_s + self.on_the_way / self.bytes_per_s) + _LATE_S
