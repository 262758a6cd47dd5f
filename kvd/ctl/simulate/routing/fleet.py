"""Modelled workers behind the production router's own code, in virtual time. Pure: chance arrives as an argument.

Arrivals, steps of workers and events happen in the order of their times. The router hears of stored and removed blocks
`EVENT_LAG_S` after they happened and of loads once a second; first and last tokens it sees at once, they are its own.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvd.ctl.simulate.routing.engine import Engine
from kvd.ctl.simulate.routing.spread import Spread
from kvd.ctl.simulate.routing.worker import Changes, Job, Worker
from kvd.ctl.simulate.traces import Prompt
from kvd.router.activeload import ActiveLoad
from kvd.router.index import Index
from kvd.router.load import Report
from kvd.router.policies import named
from kvd.router.policies.choice import Candidate, Draw, Matched, Policy
from kvd.router.predicted import Predicted
from kvd.router.rates import Rates
from kvd.router.work import Request

EVENT_LAG_S: Final = 0.02
REPORT_EVERY_S: Final = 1.0

POLICIES: Final = {name: made for name, made in named.POLICIES.items() if name != "least_busy"}  # what others publish


@dataclass(slots=True)
class Fleet:
    """`workers` alike, as far as the router knows of one kind; `policy` is one of POLICIES."""

    engine: Engine
    block_tokens: int
    workers: int
    policy: str
    draw: Draw
    jobs: list[Job] = field(default_factory=list)
    intervals: Spread = field(default_factory=Spread)
    members: list[Worker] = field(init=False)
    _names: list[str] = field(init=False)
    _policy: Policy = field(init=False)
    _index: Index = field(init=False)
    _load: ActiveLoad = field(default_factory=ActiveLoad)
    _predicted: Predicted = field(default_factory=Predicted)
    _kind: Rates = field(default_factory=Rates)
    _rates: list[Rates] = field(init=False)
    _news: deque[tuple[float, int, Changes]] = field(default_factory=deque)
    _due: list[tuple[float, int]] = field(default_factory=list)  # a heap; stale where a worker's step was cut short
    _reported_at: float = 0.0

    def __post_init__(self) -> None:
        self.members = [Worker(self.engine, self.block_tokens, self.intervals) for _ in range(self.workers)]
        self._names = [f"worker{number}" for number in range(self.workers)]
        self._rates = [Rates() for _ in self._names]
        for rates in self._rates:
            rates.follow(self._kind)
        by_name = dict(zip(self._names, self._rates, strict=True))
        self._policy = POLICIES[self.policy](self.draw, by_name.__getitem__)
        self._index = Index(2 * self.workers * (self.engine.kv_tokens // self.block_tokens + 1))  # events come late

    def replay(self, prompts: Sequence[Prompt], scale: float = 1.0) -> None:
        """Every prompt at its time multiplied by `scale`, to the last token."""
        for number, prompt in enumerate(prompts):
            at = prompt.at * scale
            self._until(at)
            self._arrive(Job(number, at, prompt.blocks, prompt.tokens, prompt.output), at)
        self._until(None)

    def _until(self, end: float | None) -> None:
        due = self._due
        while due and (end is None or due[0][0] <= end):
            now, number = heapq.heappop(due)
            worker = self.members[number]
            if worker.until != now:
                continue
            self._hear(number, worker.run(now), now)
            if worker.until is not None:
                heapq.heappush(due, (worker.until, number))

    def _hear(self, number: int, changes: Changes, now: float) -> None:
        name, rates = self._names[number], self._rates[number]
        for job in changes.first:
            served = self._load.first_token(str(job.number), now, job.cached)
            self._predicted.prefilled(str(job.number), name, now)
            if served is not None:
                rates.prefilled(*served)
        for job in changes.ended:
            self._load.progressed(str(job.number), job.output)
            if job.output > 1:
                load = self._load.at(name, now)
                each = (job.ended_at - job.first_at) / (job.output - 1)
                rates.decoded(load.running, load.context_tokens, each)
            rates.answered(job.output)
            self._load.finished(str(job.number), now)
        if changes.stored or changes.removed:
            self._news.append((now + EVENT_LAG_S, number, changes))

    def _learn(self, now: float) -> None:
        """Events whose time has come, and reports."""
        while self._news and self._news[0][0] <= now:
            _, number, changes = self._news.popleft()
            for parent, hashes in changes.stored:
                whole = self._index.store(number, parent, hashes)
                assert whole, "a modelled worker stays within its memory"
            if changes.removed:
                self._index.remove(number, changes.removed)
        if now - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = now
            for rates in (self._kind, *self._rates):
                rates.learn()
            for name, worker in zip(self._names, self.members, strict=True):
                self._load.reported(name, _report(worker, now))

    def _arrive(self, job: Job, now: float) -> None:
        self._learn(now)
        request = Request(str(job.number), job.tokens, job.chain, self.block_tokens)
        held = self._index.match(job.chain)
        candidates = []
        for number, name in enumerate(self._names):
            expected = self._predicted.match(name, job.chain, now)
            matched = Matched(
                gpu=min(held.get(number, 0) * self.block_tokens, job.tokens),
                expected=min(expected * self.block_tokens, job.tokens),
            )
            candidates.append(Candidate(name, matched, self._load.at(name, now)))
        chosen = self._policy.choose(request, candidates, now).winner.candidate
        number = self._names.index(chosen.worker)
        self._load.sent(request.id, chosen.worker, job.tokens, max(chosen.matched), now)
        self._predicted.sent(request.id, chosen.worker, job.chain)
        self.jobs.append(job)
        worker = self.members[number]
        before = worker.until
        worker.arrive(job, now)
        if worker.until is not None and worker.until != before:
            heapq.heappush(self._due, (worker.until, number))


def _report(worker: Worker, now: float) -> Report:
    most = worker.engine.kv_tokens
    return Report(now, worker.running, len(worker.waiting), worker.waiting_tokens, most - worker.free_tokens, most)
