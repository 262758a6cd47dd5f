"""What it costs to send a request to one worker, in seconds of somebody's waiting. Pure.

    its first token   queue_s     what is before it there
                    + room_s      until there is KV memory for it, where that takes longer
                    + load_s      of what is in tiers below the GPU, as far as that beats computing it
                    + compute_s   of the rest, longer where what is computed there now takes longer than expected
    token intervals + interval_s  its own, and what those of the requests that run there grow by
    others' first   + step_s      how much longer the prompts wait that are computed in the same step
                    + later_s     how much later those who come get theirs

Every request has one first token and one mean interval between the others, and all of this is seconds that one of
these grows by: nothing is weighed by hand.

`later_s`: work that is added behind a backlog delays everybody who comes to that worker until it is idle again. That
many come: the worker's own arrivals a second, for as long as its backlog lasts at the speed that arriving work leaves
for it (the value function of a queue that serves in order):

    later_s = (own arrivals * ahead_s * work_s + mean arrivals * (most_s * work_s - most_s ** 2 / 2)) / (1 - load)
    most_s  = the lesser of work_s and what going elsewhere takes

Where few requests come, as to a worker that is deep in long prompts, another long prompt harms few. The second part is
of those who come while the work is being done. Without it a long prompt that leaves its prefix because there is a line
looks cheap at any idle worker, keeps that one from its own prefixes, and their prompts leave too; counted as if nobody
had a choice, it keeps prompts where no room is.
"""

import msgspec

from kvd.router.load import Load
from kvd.router.policies.choice import Matched
from kvd.router.rates import Rates

_TIERS = ("ram", "nvme", "shared")  # the nearest first


class Prefix(msgspec.Struct, frozen=True, gc=False):
    """What becomes of a prompt there: computed from `cached` tokens on, of which some are loaded before."""

    cached: int
    load_s: float
    compute_s: float


class Busy(msgspec.Struct, frozen=True, gc=False):
    """How busy a worker is kept, and what its requests could do instead."""

    arrivals_per_s: float  # requests that come to it
    mean_per_s: float  # and that come to a worker on average
    load: float  # seconds of work that come to a worker in a second, below 1.0
    elsewhere_s: float  # how much later first tokens would come if the chosen worker were not there, on average


class Cost(msgspec.Struct, frozen=True, gc=False):
    """Seconds, as above."""

    queue_s: float
    room_s: float
    load_s: float
    compute_s: float
    interval_s: float
    step_s: float
    later_s: float

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.room_s + self.load_s + self.compute_s

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.interval_s + self.step_s + self.later_s


def prefix(tokens: int, matched: Matched, rates: Rates) -> Prefix:
    """Where to stop loading and start computing, so that both together take least.

    A tier brings what is beyond the nearer ones. What is loaded is always a prefix: there are as many ways as tiers.
    """
    gpu, ram, nvme, shared, expected = matched
    covered = expected if expected > gpu else gpu
    best = Prefix(covered, 0.0, rates.prompt_s(tokens, covered))
    if ram <= covered and nvme <= covered and shared <= covered:
        return best
    load_s = 0.0
    for tier, there in zip(_TIERS, (ram, nvme, shared), strict=True):
        if there <= covered:
            continue
        load_s += rates.load_s(tier, there - covered)
        covered = there
        compute_s = rates.prompt_s(tokens, covered)
        if load_s + compute_s < best.load_s + best.compute_s:
            best = Prefix(covered, load_s, compute_s)
    return best


def queue_s(load: Load, rates: Rates, slow: float = 1.0) -> float:
    """Until all prompts that are before a new one are computed, by a worker that is so much slower than its rates."""
    if not load.queued.prompts:
        return 0.0
    head_s, begun_s = slow * rates.prefill_s(load.head), load.head_s
    left_s = slow * rates.prefill_s(load.queued) - (begun_s if begun_s < head_s else head_s)
    return left_s if left_s > 0.0 else 0.0


def slowness(load: Load, rates: Rates) -> float:
    """How many times slower than its rates say a worker is by what it has not done yet: 1.0, or more.

    The step in progress has the prompts in line, as far as a step goes. One that takes up to twice as long as expected
    says nothing: rates are means. What took longer still will go on like that, as far as anybody knows.
    """
    if not load.queued.tokens or load.head_s <= 2.0 * (head_s := rates.prefill_s(load.head)):
        return 1.0
    part = min(1.0, rates.chunk_tokens / load.queued.tokens)
    starts_s = rates.interval_s(load.running, load.context_tokens) if load.running else 0.0
    expected_s = starts_s + max(head_s, part * rates.prefill_s(load.queued))
    return max(1.0, load.head_s / max(expected_s, 1e-9) - 1.0)


def room_s(tokens: int, load: Load, rates: Rates) -> float:
    """Until those that run have left room for `tokens` and their answer, and for all that wait before."""
    if load.free_tokens is None or not load.running:
        return 0.0
    short = tokens + rates.answer_tokens - load.free_tokens
    if short <= 0:
        return 0.0
    answer_s = rates.answer_tokens * rates.interval_s(load.running, load.context_tokens)
    return short * answer_s / max(1, load.context_tokens)


def interval_s(tokens: int, compute_s: float, load: Load, rates: Rates) -> float:
    """Its own mean interval, and what others' grow by: longer steps, and the pause while its prompt is computed."""
    running, (waiting, queued, _) = load.running, load.queued
    context = load.context_tokens + queued
    own, request_s, context_s = rates.decode.coefficients
    others = running + waiting
    now = own + request_s * others + context_s * context
    then = own + request_s * (others + 1) + context_s * (context + tokens)
    return then + others * (then - now) + running * compute_s / rates.answer_tokens


def step_s(tokens: int, load: Load, rates: Rates) -> float:
    """What the prompts in line lose that will share a step with `tokens` more: all of a step end with it.

    Steps are filled from the first in line; the one in progress cannot grow any more.
    """
    (prompts, waiting, _), chunk = load.queued, rates.chunk_tokens
    if not waiting:
        return 0.0
    behind, running = waiting, load.running
    if load.head_s > (rates.interval_s(running, load.context_tokens) if running else 0.0):
        behind -= min(chunk, load.head.tokens)
        prompts -= behind < waiting
    if not prompts or not behind:
        return 0.0
    last = behind % chunk
    mates = prompts * last / behind
    if not mates:
        return 0.0
    return mates * rates.prompt_s(min(tokens, chunk - last), 0)


def later_s(work_s: float, ahead_s: float, busy: Busy) -> float:
    """What requests that come later wait for this work, which begins in `ahead_s`.

    Who comes before it begins waits for all of it. Who comes while it is being done waits for what is left of it, or
    goes elsewhere if that is faster: the mean worker's share of requests, as one that starts anew has no line yet.
    """
    elsewhere_s = busy.elsewhere_s
    most_s = work_s if work_s < elsewhere_s else elsewhere_s
    behind = busy.arrivals_per_s * ahead_s * work_s
    meanwhile = busy.mean_per_s * most_s * (work_s - most_s / 2)
    return (behind + meanwhile) / (1.0 - busy.load)


def cost(tokens: int, matched: Matched, load: Load, rates: Rates, busy: Busy) -> Cost:
    """Of a prompt of so many tokens at one worker."""
    there, slow = prefix(tokens, matched, rates), slowness(load, rates)
    ahead_s = queue_s(load, rates, slow)
    load_s, compute_s = there.load_s, slow * there.compute_s
    full_s = room_s(tokens, load, rates) - ahead_s  # prompts before it are computed meanwhile
    if full_s < 0.0:
        full_s = 0.0
    return Cost(
        ahead_s,
        full_s,
        load_s,
        compute_s,
        interval_s(tokens, compute_s, load, rates),
        slow * step_s(tokens - there.cached, load, rates),
        later_s(load_s + compute_s, ahead_s + full_s, busy),
    )
