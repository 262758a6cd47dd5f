"""The default: least expected waiting, the request's own and everybody else's, in seconds. Pure.

See kvd.router.cost for what is counted. Who costs the same is told apart by free KV memory, then by rendezvous hashing
of the prompt's first block: equal prompts meet, different ones spread, and nobody is first in every list.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import Final

import xxhash

from kvd.router.cost import Busy, Cost, cost, queue_s
from kvd.router.policies.choice import Candidate, Choice, Scored, by_cost
from kvd.router.rates import Rates
from kvd.router.work import Request

_MEMORY_S: Final = 30.0  # how long arrivals count for the fleet's load
_FULL: Final = 0.95  # a fleet that gets more than it can do catches up some day


class Kvd:
    """`rates` gives what is known of a worker."""

    name = "kvd"

    def __init__(self, rates: Callable[[str], Rates]) -> None:
        self._rates = rates
        self._arrivals = 0.0  # recent ones, counted less the older they are
        self._work_s = 0.0  # theirs
        self._at = 0.0

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        busy = self._busy(candidates, now)
        choice = by_cost(
            self.name,
            [self._score(request, each, busy) for each in candidates],
            lambda each: (-(each.candidate.load.free_tokens or 0), -_draw(request, each.candidate.worker)),
        )
        terms = choice.winner.terms
        self._work_s += terms["load_s"] + terms["compute_s"]
        return choice

    def _score(self, request: Request, each: Candidate, busy: Busy) -> Scored:
        terms: Cost = cost(request.tokens, each.matched, each.load, self._rates(each.worker), busy)
        return Scored(each, sum(terms), terms._asdict(), terms.ttft_s)

    def _busy(self, candidates: Sequence[Candidate], now: float) -> Busy:
        fading = exp(min(0.0, self._at - now) / _MEMORY_S)
        self._at = now
        self._arrivals = self._arrivals * fading + 1.0
        self._work_s *= fading
        workers = len(candidates)
        backlog_s = sum(queue_s(each.load, self._rates(each.worker)) for each in candidates) / workers
        share = _MEMORY_S * workers
        return Busy(workers, self._arrivals / share, min(_FULL, self._work_s / share), backlog_s)


def _draw(request: Request, worker: str) -> int:
    first = request.chain[0] if request.chain else request.id
    return xxhash.xxh3_64_intdigest(f"{worker} {first}".encode())
