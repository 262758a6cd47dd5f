"""A cost that is linear in what is known beforehand, learnt from what was observed. Pure, bounded, no clock.

    seconds = c0 * part0 + c1 * part1 + ...      no coefficient below zero

The errors that count are relative, so that short and long ones weigh alike; an observation that lies far from what the
others say counts less the farther it lies, so one that something got in the way of changes little. Only the last
`_KEPT` are looked at: an engine that has changed is another one soon.

The prior is a shape. What all observations together say is how fast this engine is; what they do not tell apart is
split between the parts as in the prior.

An engine may be `like` others, of one model in one configuration: one more regression is told what all of them did.
Its shape is theirs, and they are as fast as it is, unless what one did itself says that it is much faster or slower:
few observations tell a factor, and a shape only badly. A worker that nothing was observed of is as fast as its like.

Who looks slow is not chosen, and who is not chosen can not show that it is faster by now. So two observations that are
as its like says always count too (one slow first prompt is no slow engine), and where nothing new comes, what was is
forgotten little by little, until it is as fast as its like again.
"""

from collections import deque
from collections.abc import Sequence
from operator import mul
from statistics import median
from typing import Final

_KEPT: Final = 256  # observations
_AT_ONCE: Final = 8  # of them, the first ones, are learnt from as they come
_ROUNDS: Final = 4
_PRIOR: Final = 1.0  # the prior's shape weighs as much as so many observations that contradict it fully
_DOUBT: Final = 2  # observations that are as its like says count beside those that it made itself
_STILL: Final = 60  # times that there was nothing new to learn, a minute: then some of what is known is forgotten
_FORGET: Final = 16  # one of so many then, and one more: all of it in an hour, a few of them in minutes
_ALIKE: Final = 1.4  # times as fast as those it is like, or as slow: that may be chance
_FAR: Final = 1.5  # times the median error
_LEAST_ERROR: Final = 0.02
_ABSURD: Final = 1000.0  # times slower or faster than the median
_SHORTEST_S, _LONGEST_S = 1e-7, 1e6  # no step of an engine lies outside; a clock that was set does


class Regression:
    """What one kind of step takes on one engine."""

    def __init__(self, prior: Sequence[float]) -> None:
        """`prior`: seconds per unit of each part, none of them zero."""
        self._prior = tuple(prior)
        self._seen: deque[tuple[tuple[float, ...], float]] = deque(maxlen=_KEPT)
        self._new = False
        self._still = 0
        self._found: tuple[float, ...] | None = self._prior  # None: what its like have, whatever that is by then
        self.observed = 0
        self.like: Regression | None = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        if self.like is not None and (self._found is None or not self._seen):
            return self.like.coefficients
        return self._found or self._prior

    def observe(self, parts: Sequence[float], seconds: float) -> None:
        """It took so long. What took no time, or had nothing to do, says nothing."""
        expected = self._by(self._prior, parts)
        if not _SHORTEST_S <= seconds <= _LONGEST_S or expected < _SHORTEST_S:
            return
        if self.like is not None:
            self.like.observe(parts, seconds)
        self._seen.append((tuple(parts), seconds))
        self.observed += 1
        self._new = True
        if len(self._seen) <= _AT_ONCE:
            self.learn()

    def learn(self) -> None:
        """Make something of what was observed since. Takes two milliseconds, a tenth of that if it is like others.

        About once a second: of one that is like others, what is not observed again for long is forgotten.
        """
        if not self._new and not self._forgets():
            return
        self._new, self._still = False, 0
        if self.like is None:
            self._learn()
            return
        shape = self.like.coefficients
        own = [seconds / max(self._by(shape, parts), _SHORTEST_S) for parts, seconds in self._seen]
        level = median([1.0] * _DOUBT + own)
        if not 1 / _ALIKE < level < _ALIKE:
            self._found = tuple(level * c for c in shape)
        else:  # the first observation of a kind may be a worker's only one, and the kind soon knows better
            self._found = shape if len(self._seen) > _AT_ONCE else None

    def _forgets(self) -> bool:
        """Nothing was new once more; whether the oldest observations were dropped for it."""
        if self.like is None or not self._seen:
            return False
        self._still += 1
        if self._still < _STILL:
            return False
        for _ in range(1 + len(self._seen) // _FORGET):
            self._seen.popleft()
        return True

    def predict(self, parts: Sequence[float]) -> float:
        """Seconds."""
        return self._by(self.coefficients, parts)

    @staticmethod
    def _by(coefficients: Sequence[float], parts: Sequence[float]) -> float:
        seconds: float = sum(map(mul, coefficients, parts))
        return seconds

    def _learn(self) -> None:
        level = median(seconds / self._by(self._prior, parts) for parts, seconds in self._seen)
        shape = [level * c for c in self._prior]
        # In units of the scaled prior a coefficient is about one, and the relative duration that rows explain is one.
        rows = [[c * part / seconds for c, part in zip(shape, parts, strict=True)] for parts, seconds in self._seen]
        rows = [row for row in rows if 1 / _ABSURD < sum(row) < _ABSURD]  # the middle one always is
        found = [1.0] * len(shape)
        for _ in range(_ROUNDS):
            errors = [abs(sum(f * part for f, part in zip(found, row, strict=True)) - 1.0) for row in rows]
            far = _FAR * max(median(errors), _LEAST_ERROR)
            found = _not_negative(rows, [min(1.0, far / max(error, 1e-12)) for error in errors])
        self._found = tuple(f * c for f, c in zip(found, shape, strict=True))


def _not_negative(rows: list[list[float]], weights: list[float]) -> list[float]:
    """Weighted least squares for a right side of ones, drawn towards ones; what would be negative is left out."""
    size = len(rows[0])
    square = [[_PRIOR * (i == j) + _dot(rows, weights, i, j) for j in range(size)] for i in range(size)]
    right = [_PRIOR + sum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i in range(size)]
    used = list(range(size))
    while used:
        solved = _solve([[square[i][j] for j in used] for i in used], [right[i] for i in used])
        lowest = min(range(len(used)), key=solved.__getitem__)
        if solved[lowest] >= 0.0:
            found = [0.0] * size
            for place, value in zip(used, solved, strict=True):
                found[place] = value
            return found
        del used[lowest]
    return [1.0] * size


def _dot(rows: list[list[float]], weights: list[float], i: int, j: int) -> float:
    return sum(w * row[i] * row[j] for w, row in zip(weights, rows, strict=True))


def _solve(square: list[list[float]], right: list[float]) -> list[float]:
    """Gauss's elimination; the matrix is positive definite, so no pivoting is needed."""
    size = len(right)
    for i in range(size):
        for j in range(i + 1, size):
            factor = square[j][i] / square[i][i]
            right[j] -= factor * right[i]
            for k in range(i, size):
                square[j][k] -= factor * square[i][k]
    found = [0.0] * size
    for i in range(size - 1, -1, -1):
        found[i] = (right[i] - sum(square[i][k] * found[k] for k in range(i + 1, size))) / square[i][i]
    return found
