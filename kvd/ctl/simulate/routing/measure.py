"""What a policy makes of a trace, in figures, and what the fleet could do at best. Pure; chance is an argument.

The *load* is a fraction of the fleet's capacity. Capacity is what the workers could do if all of their caches were one
that all can use, the least recently used leaving it, and if decode always ran with as many requests as memory holds:

    requests a second = workers / mean seconds of (prefill of what such a cache lacks + share of such decode steps)

No way to route reaches that, because no worker has the others' caches: at a load of 1.0 every real fleet is late in
the end. The trace's timestamps are scaled so that its requests come at that rate on average; its bursts stay bursts.
"""

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import NamedTuple

from kvd.ctl.simulate.routing.engine import Engine, pairs
from kvd.ctl.simulate.routing.fleet import Fleet
from kvd.ctl.simulate.routing.radix import Radix
from kvd.ctl.simulate.routing.worker import room
from kvd.ctl.simulate.traces import Prompt, block_tokens
from kvd.errors import KvdError
from kvd.router.policies.choice import Draw


class Percentiles(NamedTuple):
    """Of durations, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Figures(NamedTuple):
    """One policy on one trace."""

    ttft_s: Percentiles
    itl_s: Percentiles
    block_hit_rate: float
    imbalance: float  # prompt tokens that the busiest worker computed, by the mean


def measure(engine: Engine, prompts: Sequence[Prompt], workers: int, policy: str, load: float, draw: Draw) -> Figures:
    """Replay the trace. Raises KvdError when a prompt is too long for the engine's memory."""
    block = block_tokens(prompts)
    longest = max(room(prompt.tokens, prompt.output, len(prompt.blocks), block) for prompt in prompts)
    if longest * block > engine.kv_tokens:
        raise KvdError(
            f"a request takes {longest * block:,} tokens of KV memory, {engine.name} has {engine.kv_tokens:,}",
            "simulate a trace of shorter prompts",
        )
    fleet = Fleet(engine, block, workers, policy, draw)
    fleet.replay(prompts, scale(engine, prompts, workers, load))
    jobs, intervals = fleet.jobs, fleet.intervals
    computed = [worker.computed for worker in fleet.members]
    return Figures(
        _percentiles(job.first_at - job.at for job in jobs),
        Percentiles(intervals.mean, intervals.at(0.5), intervals.at(0.9), intervals.at(0.99)),
        sum(-(-job.cached // block) for job in jobs) / max(1, sum(len(job.chain) for job in jobs)),
        max(computed) / mean(computed),
    )


def scale(engine: Engine, prompts: Sequence[Prompt], workers: int, load: float) -> float:
    """By what the trace's timestamps are multiplied for this load."""
    span_s = prompts[-1].at - prompts[0].at
    return work_s(engine, prompts, workers) / workers / load / span_s if span_s > 0 else 1.0


def work_s(engine: Engine, prompts: Sequence[Prompt], workers: int) -> float:
    """One worker's seconds for all of the trace, with all the fleet's memory as one cache."""
    batch = min(engine.most_running, engine.kv_tokens / mean(prompt.tokens + prompt.output for prompt in prompts))
    context = batch * mean(prompt.tokens + prompt.output / 2 for prompt in prompts)
    step_s = engine.decode_s(round(batch), context)
    decode_s = sum(prompt.output for prompt in prompts) * step_s / batch
    return len(prompts) * alone_s(engine, prompts, workers) + decode_s


def alone_s(engine: Engine, prompts: Sequence[Prompt], workers: int) -> float:
    """Mean prefill with such a cache: the time to first token if nobody ever waited for anybody."""
    block = block_tokens(prompts)
    cache = Radix(engine.kv_tokens // block * workers)
    prefill_s = 0.0
    for prompt in prompts:
        found, whole = cache.match(prompt.blocks), len(prompt.blocks)
        cache.hold(prompt.blocks, found)
        cache.take(whole - found)
        cache.share(prompt.blocks, found, whole)
        cache.let_go(prompt.blocks, whole)
        cached = min(found * block, prompt.tokens - 1)
        prefill_s += engine.prefill_s(prompt.tokens - cached, pairs(cached, prompt.tokens - cached))
    return prefill_s / len(prompts)


def _percentiles(durations: Iterable[float]) -> Percentiles:
    found = sorted(durations)
    return Percentiles(mean(found), *(found[min(len(found) - 1, int(len(found) * part))] for part in (0.5, 0.9, 0.99)))
