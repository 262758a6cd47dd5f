"""The default: least expected waiting, the request's own and everybody else's, in seconds. Pure.

See kvd.router.cost for what is counted. Who costs the same is told apart by free KV memory, then by rendezvous hashing
of the prompt's first block: equal prompts meet, different ones spread, and nobody is first in every list.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import Final, NamedTuple

import xxhash

from kvd.router.cost import Busy, cost
from kvd.router.policies.choice import Candidate, Choice, Scored, by_cost
from kvd.router.rates import Rates
from kvd.router.work import Request

_MEMORY_S: Final = 30.0  # how long arrivals count
_SHORTEST_S: Final = 1.0  # the least time that arrivals are counted over
_FULL: Final = 0.95  # workers that get more than they can do catch up some day
_FORGOTTEN: Final = 1e-4  # of an arrival


class _Recent(NamedTuple):
    """What came to a worker, less the older it is."""

    arrivals: float = 0.0
    work_s: float = 0.0
    elsewhere_s: float = 0.0  # how much later first tokens would have come from the next best worker

    def plus(self, choice: Choice) -> "_Recent":
        terms = choice.winner.terms
        return _Recent(
            self.arrivals + 1.0,
            self.work_s + terms["load_s"] + terms["compute_s"],
            self.elsewhere_s + _elsewhere_s(choice),
        )

    def faded(self, part: float) -> "_Recent":
        return _Recent(*(part * each for each in self))


_NONE: Final = _Recent()


class Kvd:
    """`rates` gives what is known of a worker. Remembers what came to each lately, and that is forgotten by itself."""

    name = "kvd"

    def __init__(self, rates: Callable[[str], Rates]) -> None:
        self._rates = rates
        self._recent: dict[str, _Recent] = {}
        self._began: float | None = None
        self._at = 0.0

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        self._fade(now)
        mean = self._mean([self._recent.get(each.worker, _NONE) for each in candidates])
        choice = by_cost(
            self.name,
            [self._score(request, each, mean) for each in candidates],
            lambda each: (-(each.candidate.load.free_tokens or 0), -_draw(request, each.candidate.worker)),
        )
        self._recent[choice.worker] = self._recent.get(choice.worker, _NONE).plus(choice)
        return choice

    def _mean(self, recent: Sequence[_Recent]) -> Busy:
        """Of all workers, this request included; what comes to one of them is filled in for each."""
        arrivals, work_s, elsewhere_s = (sum(parts) for parts in zip(*recent, strict=True))
        window_s, count = self._window_s(), len(recent)
        return Busy(
            arrivals_per_s=0.0,
            mean_per_s=(arrivals + 1.0) / count / window_s,
            load=min(_FULL, work_s / count / window_s),
            elsewhere_s=elsewhere_s / arrivals if arrivals else 0.0,
        )

    def _score(self, request: Request, each: Candidate, mean: Busy) -> Scored:
        arrivals = self._recent.get(each.worker, _NONE).arrivals + 1.0  # this one included
        busy = mean._replace(arrivals_per_s=arrivals / self._window_s())
        terms = cost(request.tokens, each.matched, each.load, self._rates(each.worker), busy)
        return Scored(each, sum(terms), terms._asdict(), terms.ttft_s)

    def _window_s(self) -> float:
        """The time that what is recent came in, as far as it counts: less than the memory at first."""
        elapsed_s = self._at - (self._at if self._began is None else self._began)
        return max(_SHORTEST_S, _MEMORY_S * (1.0 - exp(-elapsed_s / _MEMORY_S)))

    def _fade(self, now: float) -> None:
        if self._began is None:
            self._began = self._at = now
        fading = exp(min(0.0, self._at - now) / _MEMORY_S)
        self._at = max(now, self._at)
        self._recent = {
            worker: recent.faded(fading) for worker, recent in self._recent.items() if recent.arrivals > _FORGOTTEN
        }


def _elsewhere_s(choice: Choice) -> float:
    """How much later the first token would come if the winner were not there."""
    first, *others = (each.ttft_s or 0.0 for each in choice.ranked)
    return max(0.0, min(others) - first) if others else 0.0


def _draw(request: Request, worker: str) -> int:
    first = request.chain[0] if request.chain else request.id
    return xxhash.xxh3_64_intdigest(f"{worker} {first}".encode())
