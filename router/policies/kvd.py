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


class Kvd:
    """`rates` gives what is known of a worker. Remembers what came to each lately, and that is forgotten by itself."""

    name = "kvd"

    def __init__(self, rates: Callable[[str], Rates]) -> None:
        self._rates = rates
        self._recent: dict[str, tuple[float, float]] = {}  # arrivals and seconds of work, less the older they are
        self._at = 0.0

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        self._fade(now)
        work_s = sum(self._recent.get(each.worker, _NONE)[1] for each in candidates)
        load = min(_FULL, work_s / _MEMORY_S / len(candidates))
        choice = by_cost(
            self.name,
            [self._score(request, each, load) for each in candidates],
            lambda each: (-(each.candidate.load.free_tokens or 0), -_draw(request, each.candidate.worker)),
        )
        terms = choice.winner.terms
        arrivals, work_s = self._recent.get(choice.worker, _NONE)
        self._recent[choice.worker] = arrivals + 1.0, work_s + terms["load_s"] + terms["compute_s"]
        return choice

    def _score(self, request: Request, each: Candidate, load: float) -> Scored:
        arrivals = self._recent.get(each.worker, _NONE)[0] + 1.0  # this one included
        busy = Busy(arrivals / _MEMORY_S, load)
        terms = cost(request.tokens, each.matched, each.load, self._rates(each.worker), busy)
        return Scored(each, sum(terms), terms._asdict(), terms.ttft_s)

    def _fade(self, now: float) -> None:
        fading = exp(min(0.0, self._at - now) / _MEMORY_S)
        self._at = now
        self._recent = {
            worker: (arrivals * fading, work_s * fading)
            for worker, (arrivals, work_s) in self._recent.items()
            if arrivals > _FORGOTTEN
        }


def _draw(request: Request, worker: str) -> int:
    first = request.chain[0] if request.chain else request.id
    return xxhash.xxh3_64_intdigest(f"{worker} {first}".encode())
