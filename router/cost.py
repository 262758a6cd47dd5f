"""What it costs to send a request to one worker, in seconds of somebody's waiting. Pure.

    ttft      queue_s     what is before it there
            + room_s      until there is KV memory for it
            + load_s      of what is in tiers below the GPU, as far as that beats computing it
            + compute_s   of the rest
    others  + interval_s  what the mean token interval of those that run there, and its own, grows by
            + later_s     how much later those get their first token who come while this worker is busy

Everything is in seconds that some request waits longer, so nothing is weighed by hand.
"""

from typing import NamedTuple

from kvd.router.load import Load
from kvd.router.policies.choice import Matched
from kvd.router.rates import Rates
from kvd.router.work import Work

_TIERS = ("ram", "nvme", "shared")  # the nearest first


class Prefix(NamedTuple):
    """What becomes of a prompt there: computed from `cached` tokens on, of which some are loaded before."""

    cached: int
    load_s: float
    compute_s: float


def prefix(tokens: int, matched: Matched, rates: Rates) -> Prefix:
    """Where to stop loading and start computing, so that both together take least.

    A tier brings what is beyond the nearer ones; what is loaded is always a prefix, so there are as many ways as tiers.
    """
    covered, load_s = max(matched.gpu, matched.expected), 0.0
    best = Prefix(covered, 0.0, rates.prefill_s(Work.of(tokens, covered)))
    for tier in _TIERS:
        there = getattr(matched, tier)
        if there <= covered:
            continue
        load_s += rates.load_s(tier, there - covered)
        covered = there
        compute_s = rates.prefill_s(Work.of(tokens, covered))
        if load_s + compute_s < best.load_s + best.compute_s:
            best = Prefix(covered, load_s, compute_s)
    return best


def queue_s(load: Load, rates: Rates) -> float:
    """Until all prompts that are before a new one are computed."""
    return max(0.0, rates.prefill_s(load.queued) - min(load.head_s, rates.prefill_s(load.head)))
