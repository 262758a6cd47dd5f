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
_FULL: Final = 0.95  # workers that get more than they can do catch up some day


class Kvd:
    """`rates` gives what is known of a worker. Remembers recent arrivals of the workers it was last asked about."""

    name = "kvd"

    def __init__(self, rates: Callable[[str], Rates]) -> None:
        self._rates = rates
        self._arrivals: dict[str, float] = {}  # recent ones by worker, counted less the older they are
        self._work_s = 0.0  # of all workers
        self._elsewhere_s = 0.0  # what the next best worker would have added to the times to first tokens
        self._at = 0.0

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        self._fade(candidates, now)
        count, arrivals = len(candidates), sum(self._arrivals.values())
        mean = Busy(
            0.0,
            (arrivals + 1.0) / count / _MEMORY_S,  # this one included
            min(_FULL, self._work_s / _MEMORY_S / count),
            self._elsewhere_s / arrivals if arrivals else 0.0,
        )
        choice = by_cost(
            self.name,
            [self._score(request, each, mean) for each in candidates],
            lambda each: (-(each.candidate.load.free_tokens or 0), -_draw(request, each.candidate.worker)),
        )
        self._arrivals[choice.worker] += 1.0
        self._work_s += choice.winner.terms["load_s"] + choice.winner.terms["compute_s"]
        self._elsewhere_s += _elsewhere_s(choice)
        return choice

    def _score(self, request: Request, each: Candidate, mean: Busy) -> Scored:
        busy = mean._replace(arrivals_per_s=(self._arrivals[each.worker] + 1.0) / _MEMORY_S)  # this one included
        terms = cost(request.tokens, each.matched, each.load, self._rates(each.worker), busy)
        return Scored(each, sum(terms), terms._asdict(), terms.ttft_s)

    def _fade(self, candidates: Sequence[Candidate], now: float) -> None:
        fading = exp(min(0.0, self._at - now) / _MEMORY_S)
        self._at = now
        self._work_s *= fading
        self._elsewhere_s *= fading
        self._arrivals = {each.worker: self._arrivals.get(each.worker, 0.0) * fading for each in candidates}


def _elsewhere_s(choice: Choice) -> float:
    """How much later the first token would come if the winner were not there."""
    first, *others = (each.ttft_s or 0.0 for each in choice.ranked)
    return max(0.0, min(others) - first) if others else 0.0


def _draw(request: Request, worker: str) -> int:
    first = request.chain[0] if request.chain else request.id
    return xxhash.xxh3_64_intdigest(f"{worker} {first}".encode())
