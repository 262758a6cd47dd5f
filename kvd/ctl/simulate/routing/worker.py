"""A modelled SGLang worker: chunked prefill that goes before decode, continuous batching, an LRU prefix cache.

Pure: time is a number. It does one thing at a time, as SGLang without mixed chunks: while a prompt waits for which
there is room, the next step prefills up to `chunk_tokens` of the first prompts in line; else all running requests
take a decode step. Decode steps that nothing interrupts are one action. A prompt's prefix is looked up when its turn
comes, its blocks can be shared as soon as its chunk is computed. Room for all of the answer is taken at once: nobody
is ever thrown out again. The answer's own blocks are not shared, because a trace does not name them.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from kvd.ctl.simulate.routing.engine import Engine, pairs
from kvd.ctl.simulate.routing.radix import Radix
from kvd.ctl.simulate.routing.spread import Spread


@dataclass(slots=True)
class Job:
    """One request on its way through a worker. Times in seconds, -1.0 until they are known."""

    number: int
    at: float
    chain: Sequence[int]
    tokens: int
    output: int
    cached: int = 0  # tokens found when its turn came
    done: int = 0  # tokens of the prompt that are there
    shared: int = 0  # leading blocks held in the cache
    private: int = 0  # blocks
    admitted: bool = False  # its room is taken
    first_at: float = -1.0
    ended_at: float = -1.0


class Changes(NamedTuple):
    """What a step did that others hear of."""

    first: list[Job]  # have their first token
    ended: list[Job]
    stored: list[tuple[int | None, list[int]]]  # parent's id, and the ids of blocks that are cached now
    removed: list[int]


@dataclass(slots=True)
class _Step:
    began: float
    ends: float
    prefills: list[tuple[Job, int]]  # with the tokens of this chunk; none: decode
    decodes: int = 0


def room(tokens: int, output: int, named: int, block_tokens: int) -> int:
    """Blocks that a request takes; the trace may name one more than its tokens fill."""
    return max(named, ceil((tokens + output) / block_tokens))


@dataclass(slots=True)
class Worker:
    """`arrive` and `run` are told the time; `until` says when `run` is due."""

    engine: Engine
    block_tokens: int
    intervals: Spread  # of all tokens but the first, in seconds
    waiting: deque[Job] = field(default_factory=deque)
    running: int = 0
    context: int = 0  # tokens of those that run
    computed: int = 0  # prompt tokens that were not cached
    busy_s: float = 0.0
    _radix: Radix = field(init=False)
    _step: _Step | None = None
    _ends: list[tuple[int, int, Job]] = field(default_factory=list)  # a heap: at which decode step
    _decoded: int = 0  # steps
    _decoded_at: float = 0.0  # when the last one ended
    _going: int = 0  # of those that run, how many were there in that step
    _removed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._radix = Radix(self.engine.kv_tokens // self.block_tokens)

    @property
    def until(self) -> float | None:
        """When the step in progress ends."""
        return self._step.ends if self._step is not None else None

    @property
    def free_tokens(self) -> int:
        """Room that nothing in progress claims."""
        return (self._radix.capacity - self._radix.claimed) * self.block_tokens

    @property
    def waiting_tokens(self) -> int:
        """Of prompts in line, what is neither computed nor cached."""
        radix, block = self._radix, self.block_tokens
        return sum(max(1, job.tokens - max(job.done, radix.match(job.chain) * block)) for job in self.waiting)

    def arrive(self, job: Job, now: float) -> None:
        """Line up; a run of decode steps ends with the one in progress, when there is room for the prompt."""
        self.waiting.append(job)
        step = self._step
        if step is None:
            self._next(now)
        elif step.decodes > 1 and len(self.waiting) == 1:
            per_step = (step.ends - step.began) / step.decodes
            step.decodes = min(step.decodes, max(1, ceil((now - step.began) / per_step)))
            step.ends = step.began + per_step * step.decodes

    def run(self, now: float) -> Changes:
        """The step in progress ends now; the next one begins."""
        step = self._step
        assert step is not None, "run is called when there is a step"
        assert step.ends == now, "run is called when it ends"
        self.busy_s += now - step.began
        changes = Changes([], [], [], [])
        if step.prefills:
            for job, tokens in step.prefills:
                self._prefilled(job, tokens, now, changes)
        else:
            self._decode(step, now, changes)
        self._next(now)
        changes.removed.extend(self._removed)
        self._removed.clear()
        return changes

    # -- what comes next ----------------------------------------------------------------------------------

    def _next(self, now: float) -> None:
        self._step = None
        chosen = self._prefills()
        if chosen:
            tokens = sum(count for _, count in chosen)
            looked_at = sum(pairs(job.done, count) for job, count in chosen)
            self._step = _Step(now, now + self.engine.prefill_s(tokens, looked_at), chosen)
        elif self.running:
            steps = self._ends[0][0] - self._decoded
            # Every step adds a token to every context.
            mean = self.engine.decode_s(self.running, self.context + self.running * (steps - 1) / 2)
            self._step = _Step(now, now + mean * steps, [], steps)

    def _prefills(self) -> list[tuple[Job, int]]:
        chosen: list[tuple[Job, int]] = []
        left = self.engine.chunk_tokens
        for job in self.waiting:
            if left <= 0 or self.running + len(chosen) >= self.engine.most_running:
                break
            if not job.admitted and not self._admit(job):
                break
            count = min(left, job.tokens - job.done)
            chosen.append((job, count))
            left -= count
        return chosen

    def _admit(self, job: Job) -> bool:
        """Look the prefix up, and take room for the rest."""
        found = self._radix.match(job.chain)
        self._radix.hold(job.chain, found)
        private = room(job.tokens, job.output, len(job.chain), self.block_tokens) - found
        gone = self._radix.take(private)
        if gone is None:
            self._radix.let_go(job.chain, found)
            return False
        self._removed += gone
        # The last token is computed even when all of the prompt is cached.
        job.cached = job.done = min(found * self.block_tokens, job.tokens - 1)
        job.shared, job.private, job.admitted = found, private, True
        return True

    # -- what a step has done -----------------------------------------------------------------------------

    def _prefilled(self, job: Job, tokens: int, now: float, changes: Changes) -> None:
        job.done += tokens
        self.computed += tokens
        whole = len(job.chain) if job.done == job.tokens else min(job.done // self.block_tokens, len(job.chain))
        if whole > job.shared:
            fresh = self._radix.share(job.chain, job.shared, whole)
            if fresh:
                known = whole - len(fresh)
                changes.stored.append((job.chain[known - 1] if known else None, fresh))
            job.private -= whole - job.shared
            job.shared = whole
        if job.done < job.tokens:
            return
        left = self.waiting.popleft()
        assert left is job, "prompts are finished in the order in which they came"
        job.first_at = now
        changes.first.append(job)
        if job.output <= 1:
            self._leave(job, now, changes)
        else:
            self.running += 1
            self.context += job.tokens + 1
            heapq.heappush(self._ends, (self._decoded + job.output - 1, job.number, job))

    def _decode(self, step: _Step, now: float, changes: Changes) -> None:
        per_step = (step.ends - step.began) / step.decodes
        self._decoded += step.decodes
        self.context += self.running * step.decodes
        # Who was here before has waited since the last step; the others since their first token.
        self.intervals.add(step.began + per_step - self._decoded_at, self._going)
        for _, _, job in self._ends if self._going < self.running else ():
            if job.first_at >= self._decoded_at:
                self.intervals.add(step.began + per_step - job.first_at, 1)
        self.intervals.add(per_step, self.running * (step.decodes - 1))
        self._decoded_at = now
        while self._ends and self._ends[0][0] == self._decoded:
            _, _, job = heapq.heappop(self._ends)
            self.running -= 1
            self.context -= job.tokens + job.output
            self._leave(job, now, changes)
        self._going = self.running

    def _leave(self, job: Job, now: float, changes: Changes) -> None:
        job.ended_at = now
        self._radix.free(job.private)
        self._radix.let_go(job.chain, job.shared)
        changes.ended.append(job)
