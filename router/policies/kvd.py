"""The default: least expected waiting, the request's own and everybody else's, in seconds. Pure.

See kvd.router.cost for what is counted. Who costs the same is told apart by free KV memory, then by rendezvous hashing
of the prompt's first block: equal prompts meet, different ones spread, and nobody is first in every list.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import Final

import xxhash

from kvd.router.cost import Busy, cost
from kvd.router.policies.choice import Candidate, Choice, Scored, by_cost
from kvd.router.rates import Rates
from kvd.router.work import Request

_MEMORY_S: Final = 30.0  # how long arrivals count
_NONE: Final = 0.0, 0.0
_FULL: Final = 0.95  # workers that get more than they can do catch up some day
_FORGOTTEN: Final = 1e-4  # of an arrival
_WORD: Final = (1 << 64) - 1


class Kvd:
    """`rates` gives what is known of a worker. Remembers what came to each lately, and that is forgotten by itself."""

    name = "kvd"

    def __init__(self, rates: Callable[[str], Rates]) -> None:
        self._rates = rates
        # Arrivals and seconds of work, less the older they are: each number counts `_weight` times as much now.
        self._recent: dict[str, tuple[float, float]] = {}
        self._weight = 1.0
        self._at = 0.0

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        self._fade(now)
        weight, recent = self._weight, [self._recent.get(each.worker, _NONE) for each in candidates]
        load = min(_FULL, weight * sum(work_s for _, work_s in recent) / _MEMORY_S / len(candidates))
        seed = _seed(request)
        choice = by_cost(
            self.name,
            [
                self._score(request, each, weight * arrivals, load)
                for each, (arrivals, _) in zip(candidates, recent, strict=True)
            ],
            lambda each: (
                -(each.candidate.load.free_tokens or 0),
                -xxhash.xxh3_64_intdigest(each.candidate.worker.encode(), seed),
            ),
        )
        terms = choice.winner.terms
        arrivals, work_s = self._recent.get(choice.worker, _NONE)
        self._recent[choice.worker] = (
            arrivals + 1.0 / weight,
            work_s + (terms["load_s"] + terms["compute_s"]) / weight,
        )
        return choice

    def _score(self, request: Request, each: Candidate, arrivals: float, load: float) -> Scored:
        busy = Busy((arrivals + 1.0) / _MEMORY_S, load)  # this one included
        terms = cost(request.tokens, each.matched, each.load, self._rates(each.worker), busy)
        return Scored(each, sum(terms), terms._asdict(), terms.ttft_s)

    def _fade(self, now: float) -> None:
        self._weight *= exp(min(0.0, self._at - now) / _MEMORY_S)
        self._at = now
        if self._weight < _FORGOTTEN:
            weight, self._weight = self._weight, 1.0
            self._recent = {
                worker: (arrivals * weight, work_s * weight)
                for worker, (arrivals, work_s) in self._recent.items()
                if arrivals * weight > _FORGOTTEN
            }


def _seed(request: Request) -> int:
    """Names the prompt's first block; one that has none is told apart by its request."""
    return request.chain[0] & _WORD if request.chain else xxhash.xxh3_64_intdigest(request.id.encode())
