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

from collections.abc import Sequence

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
    """How busy workers are kept on average, and what their requests could do instead."""

    arrivals_per_s: float  # requests that come to one of them
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


class Ahead(msgspec.Struct, frozen=True, gc=False):
    """What any prompt meets at a worker; follows from its load and its rates, and holds as long as they do."""

    load: Load
    prefill: Sequence[float]  # coefficients, of which this was made
    decode: Sequence[float]
    chunk_tokens: int
    queued_s: float  # to compute all that waits
    head_s: float  # and the first of it
    step_s: float  # of decode: what is in line is computed from the next one on
    others: int  # that run, when all that waits does
    interval_s: float  # theirs
    mates: float  # prompts in line that share the last step
    room: int  # tokens that this has left
    mates_begun: float  # where the first step is in progress
    room_begun: int

    @classmethod
    def of(cls, load: Load, rates: Rates) -> "Ahead":
        decode, chunk = rates.decode.coefficients, rates.chunk_tokens
        prompts, tokens, _ = load.queued
        running, context = load.running, load.context_tokens
        first = min(chunk, load.head.tokens)
        return cls(
            load,
            rates.prefill.coefficients,
            decode,
            chunk,
            rates.prefill_s(load.queued) if prompts else 0.0,
            rates.prefill_s(load.head),
            rates.interval_s(running, context) if running else 0.0,
            running + prompts,
            rates.interval_s(running + prompts, context + tokens),
            *_last_step(prompts, tokens, chunk),
            *_last_step(prompts - (first > 0), tokens - first, chunk),
        )

    def holds(self, load: Load, rates: Rates) -> bool:
        """Whether it is what `of` would give."""
        return (
            self.load is load
            and self.prefill is rates.prefill.coefficients
            and self.decode is rates.decode.coefficients
            and self.chunk_tokens == rates.chunk_tokens
        )

    def queue_s(self, now: float, slow: float = 1.0) -> float:
        """Until all prompts before a new one are computed, by a worker that is so much slower than its rates."""
        queued_s = self.queued_s
        if not queued_s:
            return 0.0
        begun_s, head_s = now - self.load.head_at, slow * self.head_s
        left_s = slow * queued_s - (begun_s if begun_s < head_s else head_s)
        return left_s if left_s > 0.0 else 0.0

    def slow(self, now: float) -> float:
        """How many times slower than its rates say a worker is by what it has not done yet: 1.0, or more.

        The step in progress has the prompts in line, as far as a step goes. One that takes up to twice as long as
        expected says nothing: rates are means. What took longer still will go on like that, as far as anybody knows.
        Counted from the engine's last report on: a head that waits for KV memory is not slow, and looks the same.
        """
        head, begun_s = self.load.head, now - self.load.head_at
        if not head.tokens or begun_s <= 2.0 * self.head_s:  # others' prompts: nobody knows since when
            return 1.0
        part = min(1.0, self.chunk_tokens / max(head.tokens, self.load.queued.tokens))
        expected_s = self.step_s + max(self.head_s, part * self.queued_s)
        return max(1.0, begun_s / max(expected_s, 1e-9) - 1.0)


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


def room_s(tokens: int, load: Load, rates: Rates) -> float:
    """Until those that run have left room for `tokens` and their answer, and for all that wait before.

    In the time of an answer they leave what they hold. What they have in common stays: where siblings of one long
    prompt fill a worker, that is nearly all of their contexts.
    """
    if load.free_tokens is None or not load.running:
        return 0.0
    short = tokens + rates.answer_tokens - load.free_tokens
    if short <= 0:
        return 0.0
    answer_s = rates.answer_tokens * rates.interval_s(load.running, load.context_tokens)
    return short * answer_s / max(1, load.held_tokens)


def step_s(tokens: int, ahead: Ahead, rates: Rates, now: float) -> float:
    """What the prompts in line lose that will share a step with `tokens` more: all of a step end with it.

    Steps are filled from the first in line; the one in progress cannot grow any more.
    """
    if now - ahead.load.head_at > ahead.step_s:
        mates, room = ahead.mates_begun, ahead.room_begun
    else:
        mates, room = ahead.mates, ahead.room
    return mates * rates.prompt_s(tokens if tokens < room else room, 0) if mates else 0.0


def later_s(work_s: float, ahead_s: float, arrivals_per_s: float, busy: Busy) -> float:
    """What requests that come later wait for this work, which begins in `ahead_s` at a worker where so many come.

    Who comes before it begins waits for all of it. Who comes while it is being done waits for what is left of it, or
    goes elsewhere if that is faster: the mean worker's share of requests, as one that starts anew has no line yet.
    """
    elsewhere_s = busy.elsewhere_s
    most_s = work_s if work_s < elsewhere_s else elsewhere_s
    behind = arrivals_per_s * ahead_s * work_s
    meanwhile = busy.arrivals_per_s * most_s * (work_s - most_s / 2)
    return (behind + meanwhile) / (1.0 - busy.load)


def cost(
    tokens: int, matched: Matched, ahead: Ahead, rates: Rates, arrivals_per_s: float, busy: Busy, now: float
) -> Cost:
    """Of a prompt of so many tokens at one worker, where so many requests come."""
    there, load, slow = prefix(tokens, matched, rates), ahead.load, ahead.slow(now)
    ahead_s = ahead.queue_s(now, slow)
    load_s, compute_s, full_s = there.load_s, slow * there.compute_s, 0.0
    free, running, answer_tokens = load.free_tokens, load.running, rates.answer_tokens
    if free is not None and free < tokens + answer_tokens:
        full_s = max(0.0, room_s(tokens, load, rates) - ahead_s)  # prompts before it are computed meanwhile
    _, request_s, context_s = ahead.decode
    longer_s = request_s + context_s * tokens  # every step, for itself and for all others
    pause_s = running * compute_s / answer_tokens  # of those that run, while its prompt is computed
    return Cost(
        ahead_s,
        full_s,
        load_s,
        compute_s,
        ahead.interval_s + (ahead.others + 1) * longer_s + pause_s,
        slow * step_s(tokens - there.cached, ahead, rates, now),
        later_s(load_s + compute_s, ahead_s + full_s, arrivals_per_s, busy),
    )


def _last_step(prompts: int, tokens: int, chunk_tokens: int) -> tuple[float, int]:
    """Of so much in line: how many of the prompts the last step has on average, and for how many tokens more there is
    room in it."""
    last = tokens % chunk_tokens
    return prompts * last / max(1, tokens), chunk_tokens - last
