"""What does computing tokens cost this worker? Seen from the plugin: a lookup misses pages, later they are stored.

Pure. What lies between the two is the prefill, and waiting in queues. It is explained by three costs, none below zero:

    seconds = token_s * computed  +  pair_s * computed * (cached + computed / 2)  +  cached_s * cached

a token's own work, its attention to what is before it, and what a token costs that a cache had (nothing to speak of
on a GPU; on a CPU, SGLang's torch_native attention goes over those too). What a hit saves is the difference of two
such sums, and kvd compares that with its disk, see kvd.daemon.gate. Waiting only makes the work look slower, so what
was faster than the costs say counts for more than what was slower.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
T = TypeVar("T")

_OPEN = 256  # lookups whose pages have not been stored yet
_RECENT = 24  # with cached tokens, and as many without: while one kind does not happen, the other does not displace it
_FULL = 128  # pages: SGLang's own batch, so there may be more of the same
_SLOWER = 0.2  # weight of an observation that was slower than explained; the faster have 1
_ROUNDS = 6
_RIDGE = np.array([1e-6, 1e-3, 1e-3])  # what the observations do not tell apart is a token's own work


@dataclass(slots=True)
class Seen:
    """One prefill: so many tokens computed after so many cached ones."""

    cached: int
    computed: int
    seconds: float


@dataclass(slots=True)
class _Begun:
    cached: int  # pages
    missed: int  # pages, or as many of them as the lookup was asked about
    since: float


@dataclass(slots=True)
class _Growing:
    """A prefill of which more may come: in chunks, or in batches."""

    begun: _Begun
    seen: Seen
    pages: int
    last_pages: int

    @property
    def whole(self) -> bool:
        """What comes after these pages was not part of the prompt."""
        return self.pages >= self.begun.missed if self.begun.missed < _FULL else self.last_pages < _FULL


@dataclass(frozen=True, slots=True)
class Costs:
    """In seconds; all zero when nothing was seen yet."""

    token_s: float = 0.0
    pair_s: float = 0.0
    cached_s: float = 0.0

    def counters(self) -> dict[str, int]:
        """As a worker reports them."""
        return {
            "prefill_tokens_per_s": int(1 / self.token_s) if self.token_s else 0,
            "prefill_ns_per_token": round(1e9 * self.token_s),
            "prefill_fs_per_pair": round(1e15 * self.pair_s),
            "prefill_ns_per_cached_token": round(1e9 * self.cached_s),
        }


@dataclass(slots=True)
class PrefillCosts:
    """Thread-safe as far as dictionaries are: an observation may get lost, no more."""

    page_tokens: int
    _begun: OrderedDict[str, _Begun] = field(default_factory=OrderedDict)  # by the first missed key
    _reads: OrderedDict[str, _Begun] = field(default_factory=OrderedDict)  # by the last key that was found
    _growing: OrderedDict[str, _Growing] = field(default_factory=OrderedDict)  # by the last key that was stored
    _fresh: deque[Seen] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _after_hits: deque[Seen] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def looked_up(self, keys: Sequence[str], found: int, before: int, now: float) -> None:
        """Of these keys the first `found` are held, and `before` pages before them are the worker's own."""
        if found >= len(keys):
            return
        begun = _Begun(before + found, len(keys) - found, now)
        _put(self._begun, keys[found], begun)
        if found:
            _put(self._reads, keys[found - 1], begun)

    def read(self, keys: Sequence[str], got: int, now: float) -> None:
        """Of these keys, which a lookup had found, the first `got` were read. What that took is no prefill."""
        begun = self._reads.pop(keys[-1], None)
        if begun is None:
            return
        begun.since = now
        if got < len(keys):
            begun.cached -= len(keys) - got
            begun.missed += len(keys) - got
            _put(self._begun, keys[got], begun)

    def computed(self, keys: Sequence[str], parent: str, now: float) -> bool:
        """These pages are being stored. True when that says something about the costs."""
        begun, growing = self._begun.pop(keys[0], None), self._growing.pop(parent, None)
        if begun is not None and now > begun.since:
            seen = Seen(begun.cached * self.page_tokens, 0, 0.0)
            growing = _Growing(begun, seen, 0, 0)
            (self._after_hits if seen.cached else self._fresh).append(seen)
        elif growing is None or growing.whole:
            return False
        growing.pages += len(keys)
        growing.last_pages = len(keys)
        growing.seen.computed = growing.pages * self.page_tokens
        growing.seen.seconds = now - growing.begun.since
        _put(self._growing, keys[-1], growing)
        return True

    def costs(self) -> Costs:
        """What explains the recent observations."""
        seen = [(s.cached, s.computed, s.seconds) for s in (*self._fresh, *self._after_hits) if s.computed]
        return _explained(np.array(seen, float)) if seen else Costs()


def _put(kept: OrderedDict[str, T], key: str, value: T) -> None:
    kept[key] = value
    if len(kept) > _OPEN:
        kept.popitem(last=False)


def _explained(seen: Numbers) -> Costs:
    """Least squares of the relative error, costs not below zero, what was faster than explained weighing more."""
    cached, computed, seconds = seen.T
    parts = np.stack([computed, computed * (cached + computed / 2), cached], axis=1) / seconds[:, None]
    scale = np.maximum(np.abs(parts).max(axis=0), 1e-300)
    parts /= scale
    weights = np.ones(len(seen))
    costs = np.zeros(3)
    for _ in range(_ROUNDS):
        costs = _not_negative(parts, weights)
        weights = np.where(parts @ costs > 1, 1.0, _SLOWER)  # explained as slower than it was
    token, pair, cached_ = costs / scale
    return Costs(float(token), float(pair), float(cached_))


def _not_negative(parts: Numbers, weights: Numbers) -> Numbers:
    """The costs that explain every relative duration, which is 1, best; those that would be negative left out."""
    square = (parts.T * weights) @ parts + np.diag(_RIDGE) * len(parts)
    right = (parts.T * weights).sum(axis=1)
    used = [0, 1, 2]
    while used:
        solved = np.linalg.solve(square[np.ix_(used, used)], right[used])
        if (solved >= 0).all():
            costs = np.zeros(3)
            costs[used] = solved
            return costs
        used.remove(used[int(solved.argmin())])
    return np.zeros(3)
