"""The default: least expected waiting, the request's own and everybody else's, in seconds. Pure.

See kvd.router.cost for what is counted. Who costs the same is told apart by free KV memory, then by rendezvous hashing
of the prompt's first block: equal prompts meet, different ones spread, and nobody is first in every list.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import Final

import msgspec
import xxhash

from kvd.router.cost import Ahead, Busy, cost
from kvd.router.policies.choice import Candidate, Choice, Scored, by_cost
from kvd.router.rates import Rates
from kvd.router.work import Request

_MEMORY_S: Final = 30.0  # how long arrivals count
_SHORTEST_S: Final = 1.0  # the least time that arrivals are counted over
_FULL: Final = 0.95  # workers that get more than they can do catch up some day
_FORGOTTEN: Final = 1e-4  # of an arrival


class _Known(msgspec.Struct):
    """Of a worker: what came to it, less the older it is, in weights of their moments, to be divided by today's; and
    what a prompt met there at the last look."""

    arrivals: float = 0.0
    work_s: float = 0.0
    elsewhere_s: float = 0.0  # how much later first tokens would have come from the next best worker
    ahead: Ahead | None = None


class Kvd:
    """`rates` gives what is known of a worker. Remembers what came to each lately, and that is forgotten by itself."""

    name = "kvd"

    def __init__(self, rates: Callable[[str], Rates]) -> None:
        self._rates = rates
        self._known: dict[str, _Known] = {}
        self._began: float | None = None
        self._at = self._anew_at = 0.0
        self._weight = 1.0  # of what comes now: instead of all that came before fading, what comes counts more

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        self._pass(now)
        find = self._known.get
        known = [find(each.worker) or self._begin(each.worker) for each in candidates]
        choice = by_cost(
            self.name,
            self._scored(request.tokens, candidates, known, now),
            lambda each: (-(each.candidate.load.free_tokens or 0), -_draw(request, each.candidate.worker)),
        )
        self._came(choice)
        return choice

    def _begin(self, worker: str) -> _Known:
        known = self._known[worker] = _Known()
        return known

    def _scored(
        self, tokens: int, candidates: Sequence[Candidate], known: Sequence[_Known], now: float
    ) -> list[Scored]:
        rates_of, weight, window_s = self._rates, self._weight, self._window_s()
        busy = self._mean(known, window_s)
        scored = []
        for each, here in zip(candidates, known, strict=True):
            load, rates, ahead = each.load, rates_of(each.worker), here.ahead
            if ahead is None or not ahead.holds(load, rates):
                ahead = here.ahead = Ahead.of(load, rates)
            arrivals_per_s = (here.arrivals / weight + 1.0) / window_s  # this one included
            terms = cost(tokens, each.matched, ahead, rates, arrivals_per_s, busy, now)
            ttft_s = terms.ttft_s
            scored.append(Scored(each, ttft_s + terms.interval_s + terms.step_s + terms.later_s, terms, ttft_s))
        return scored

    def _mean(self, known: Sequence[_Known], window_s: float) -> Busy:
        """Of all workers, this request included."""
        arrivals = work_s = elsewhere_s = 0.0
        for here in known:
            arrivals += here.arrivals
            work_s += here.work_s
            elsewhere_s += here.elsewhere_s
        each_s = len(known) * window_s
        return Busy(
            (arrivals / self._weight + 1.0) / each_s,
            min(_FULL, work_s / self._weight / each_s),
            elsewhere_s / arrivals if arrivals else 0.0,
        )

    def _window_s(self) -> float:
        """The time that what is recent came in, as far as it counts: less than the memory at first."""
        elapsed_s = self._at - (self._at if self._began is None else self._began)
        return max(_SHORTEST_S, _MEMORY_S * (1.0 - exp(-elapsed_s / _MEMORY_S)))

    def _came(self, choice: Choice) -> None:
        """To the winner."""
        here, weight, terms = self._known[choice.worker], self._weight, choice.winner.terms
        here.arrivals += weight
        here.work_s += weight * (terms["load_s"] + terms["compute_s"])
        here.elsewhere_s += weight * _elsewhere_s(choice)

    def _pass(self, now: float) -> None:
        """Time passes. Weights begin anew before they are large, without those that count no more."""
        if self._began is None:
            self._began = self._at = self._anew_at = now
        self._at = max(now, self._at)
        memories = (self._at - self._anew_at) / _MEMORY_S
        if memories > 1.0:
            part, memories, self._anew_at = exp(-memories), 0.0, self._at
            kept = [(name, here) for name, here in self._known.items() if here.arrivals * part > _FORGOTTEN]
            self._known = {
                name: _Known(part * here.arrivals, part * here.work_s, part * here.elsewhere_s) for name, here in kept
            }
        self._weight = exp(memories)


def _elsewhere_s(choice: Choice) -> float:
    """How much later the first token would come if the winner were not there."""
    first, *others = [each.ttft_s or 0.0 for each in choice.ranked]
    return max(0.0, min(others) - first) if others else 0.0


def _draw(request: Request, worker: str) -> int:
    first = request.chain[0] if request.chain else request.id
    return xxhash.xxh3_64_intdigest(f"{worker} {first}".encode())
