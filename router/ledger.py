"""The hit ledger: how much of every prompt could have been cached, how much was, and what the rest was lost to. Pure.

    available   leading tokens that were asked for lately (kvd.router.seen): a cache of any size would have them
    achieved    what the engine says was cached
    lost to     eviction  it was nowhere any more, or left the worker between the choice and the prefill
                routing   another worker had more of it than the one that was chosen
                gate      it was on a tier of the chosen worker's node, and was not loaded
                lag       the worker was believed to have it and had not, and no event has said that it left

Every token that is lost is lost once, so available = achieved + all that was lost; what was cached and not foreseen
counts as available too. At most `MOST_OPEN` requests wait for their answer; the oldest are given up, and counted.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from kvd.router.policies.choice import Matched

MOST_OPEN: Final = 1 << 14

Loss = Literal["eviction", "routing", "gate", "lag"]


class _Open(NamedTuple):
    seen: int
    best: int
    chosen: Matched


class Settled(NamedTuple):
    """One request, in tokens."""

    available: int
    achieved: int
    lost: Mapping[Loss, int]


@dataclass(slots=True)
class Ledger:
    """Totals, in tokens but for the counts of requests."""

    requests: int = 0
    given_up: int = 0  # their answers never said how much was cached
    tokens: int = 0
    available: int = 0
    achieved: int = 0
    lost: dict[Loss, int] = field(default_factory=lambda: {"eviction": 0, "routing": 0, "gate": 0, "lag": 0})
    _open: OrderedDict[str, _Open] = field(default_factory=OrderedDict)

    def sent(self, request: str, seen: int, best: int, chosen: Matched) -> None:
        """`seen` leading tokens were asked for before; `best` is the most that any worker has, `chosen` what this."""
        self._open.pop(request, None)
        self._open[request] = _Open(seen, best, chosen)
        if len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
            self.given_up += 1

    def dropped(self, request: str) -> None:
        """There is no answer to count: an error, or the client has gone."""
        self.given_up += self._open.pop(request, None) is not None

    def answered(self, request: str, tokens: int, cached: int, still: int) -> Settled | None:
        """`cached` of the prompt's `tokens`, as the engine says; `still`: what its GPU has now, by events."""
        sent = self._open.pop(request, None)
        if sent is None:
            return None
        settled = settle(sent.seen, sent.best, sent.chosen, min(cached, tokens), still)
        self.requests += 1
        self.tokens += tokens
        self.available += settled.available
        self.achieved += settled.achieved
        for loss, count in settled.lost.items():
            self.lost[loss] += count
        return settled


def settle(seen: int, best: int, chosen: Matched, cached: int, still: int) -> Settled:
    """What one request lost, from the far end of its prompt to the near one."""
    there = max(chosen)
    on_gpu = max(chosen.gpu, chosen.expected)
    available = max(seen, best, there, cached)
    lost: dict[Loss, int] = {}
    left = available - cached

    def take(loss: Loss, count: int) -> None:
        nonlocal left
        taken = min(left, max(0, count))
        left -= taken
        if taken:
            lost[loss] = taken

    take("eviction", available - max(best, there, cached))
    take("routing", best - max(there, cached))
    take("gate", there - max(on_gpu, cached))
    gone = min(left, max(0, on_gpu - max(still, cached)))
    left -= gone
    if gone:
        lost["eviction"] = lost.get("eviction", 0) + gone
    take("lag", left)
    return Settled(available, cached, lost)
