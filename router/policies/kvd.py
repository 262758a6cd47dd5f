"""The default: least expected waiting, the request's own and everybody else's, in seconds. Pure.

See kvd.router.cost for what is counted. Who costs the same is told apart by free KV memory, then by rendezvous hashing
of the prompt's first block: equal prompts meet, different ones spread, and nobody is first in every list.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import Final

import msgspec
import xxhash

from kvd.router.cost import Busy, cost
from kvd.router.policies.choice import Candidate, Choice, Scored, by_cost
from kvd.router.rates import Rates
from kvd.router.work import Request

_MEMORY_S: Final = 30.0  # how long arrivals count
_SHORTEST_S: Final = 1.0  # the least time that arrivals are counted over
_FULL: Final = 0.95  # workers that get more than they can do catch up some day
_FORGOTTEN: Final = 1e-4  # of an arrival


class _Recent(msgspec.Struct, gc=False):
    """What came to a worker, less the older it is: in weights of their moments, to be divided by today's."""

    arrivals: float = 0.0
    work_s: float = 0.0
    elsewhere_s: float = 0.0  # how much later first tokens would have come from the next best worker


_NONE: Final = _Recent()


class Kvd:
    """`rates` gives what is known of a worker. Remembers what came to each lately, and that is forgotten by itself."""

    name = "kvd"

    def __init__(self, rates: Callable[[str], Rates]) -> None:
        self._rates = rates
        self._recent: dict[str, _Recent] = {}
        self._began: float | None = None
        self._at = self._anew_at = 0.0
        self._weight = 1.0  # of what comes now: instead of all that came before fading, what comes counts more

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        self._pass(now)
        tokens, rates = request.tokens, self._rates
        recent = [self._recent.get(each.worker, _NONE) for each in candidates]
        window_s, mean = self._mean(recent)
        scored = []
        for each, came in zip(candidates, recent, strict=True):
            arrivals_per_s = (came.arrivals / self._weight + 1.0) / window_s  # this one included
            busy = Busy(arrivals_per_s, mean.mean_per_s, mean.load, mean.elsewhere_s)
            terms = cost(tokens, each.matched, each.load, rates(each.worker), busy)
            scored.append(Scored(each, terms.total_s, terms, terms.ttft_s))
        choice = by_cost(
            self.name,
            scored,
            lambda each: (-(each.candidate.load.free_tokens or 0), -_draw(request, each.candidate.worker)),
        )
        self._came(choice)
        return choice

    def _mean(self, recent: Sequence[_Recent]) -> tuple[float, Busy]:
        """The time that what is recent came in, as far as it counts: less than the memory at first. And how busy all
        are, this request included; what comes to one of them is filled in for each."""
        elapsed_s = self._at - (self._at if self._began is None else self._began)
        window_s = max(_SHORTEST_S, _MEMORY_S * (1.0 - exp(-elapsed_s / _MEMORY_S)))
        arrivals = work_s = elsewhere_s = 0.0
        for came in recent:
            arrivals += came.arrivals
            work_s += came.work_s
            elsewhere_s += came.elsewhere_s
        each_s = len(recent) * window_s
        return window_s, Busy(
            arrivals_per_s=0.0,
            mean_per_s=(arrivals / self._weight + 1.0) / each_s,
            load=min(_FULL, work_s / self._weight / each_s),
            elsewhere_s=elsewhere_s / arrivals if arrivals else 0.0,
        )

    def _came(self, choice: Choice) -> None:
        """To the winner."""
        came = self._recent.get(choice.worker)
        if came is None:
            came = self._recent[choice.worker] = _Recent()
        weight, terms = self._weight, choice.winner.terms
        came.arrivals += weight
        came.work_s += weight * (terms["load_s"] + terms["compute_s"])
        came.elsewhere_s += weight * _elsewhere_s(choice)

    def _pass(self, now: float) -> None:
        """Time passes. Weights begin anew before they are large, without those that count no more."""
        if self._began is None:
            self._began = self._at = self._anew_at = now
        self._at = max(now, self._at)
        memories = (self._at - self._anew_at) / _MEMORY_S
        if memories > 1.0:
            part, memories, self._anew_at = exp(-memories), 0.0, self._at
            kept = [(name, came) for name, came in self._recent.items() if came.arrivals * part > _FORGOTTEN]
            self._recent = {
                name: _Recent(part * came.arrivals, part * came.work_s, part * came.elsewhere_s) for name, came in kept
            }
        self._weight = exp(memories)


def _elsewhere_s(choice: Choice) -> float:
    """How much later the first token would come if the winner were not there."""
    first, *others = [each.ttft_s or 0.0 for each in choice.ranked]
    return max(0.0, min(others) - first) if others else 0.0


def _draw(request: Request, worker: str) -> int:
    first = request.chain[0] if request.chain else request.id
    return xxhash.xxh3_64_intdigest(f"{worker} {first}".encode())
