"""The simplest steering: each request to the worker that has the fewest, and a fair queue when all have enough.

Knows nothing of prefixes. A worker that could not be reached, or died, rests for a moment that doubles each time.
Who was sent to a worker before, and what does not generate, does not queue.

A steering that knows more (kvd.router.informed) says who serves a model, and which of those that are free it takes:
`_serving` and `_pick`. Whoever waits is asked about again when its turn has come, by what is known then.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvd.router.queue import FairQueue
from kvd.router.steering import Busy, Choice, Incoming, Outcome, Worker

_REST_S, _LONGEST_REST_S = 0.5, 15.0
_GONE_AFTER = 3  # failures in a row: nobody waits for such a worker
_FAILURES: frozenset[Outcome] = frozenset({"unreachable", "refused", "no_answer", "cut"})


@dataclass(slots=True)
class Standing:
    """What is known of a worker."""

    worker: Worker
    requests: int = 0
    chosen: int = 0  # when it was chosen last, in choices: breaks ties
    failures: int = 0  # in a row
    rests_until: float = 0.0

    def awake(self, now: float) -> bool:
        """It may be given something."""
        return self.rests_until <= now


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request that wants a worker. `prompt`: what a steering that knows more has found out about it."""

    request: Incoming
    tried: frozenset[str]
    model: str | None = None  # that it names; None: any worker will do
    prompt: Any = None


@dataclass(slots=True, eq=False)
class _Waiting:
    asked: Asked
    turn: asyncio.Future[Choice]


class LeastBusy:
    """Steering by the number of requests that workers have. Implements kvd.router.steering.Steering."""

    def __init__(self, workers: Sequence[Worker], most_each: int, most_waiting: int) -> None:
        self._loads = {worker.name: Standing(worker) for worker in workers}
        self._most_each = most_each
        self._queue: FairQueue[_Waiting] = FairQueue(most_waiting)
        self._choices = 0
        self._counts: Counter[str] = Counter()

    async def choose(self, request: Incoming, tried: frozenset[str]) -> Choice:
        return await self._choose(Asked(request, tried))

    async def _choose(self, asked: Asked) -> Choice:
        loop = asyncio.get_running_loop()
        now = loop.time()
        others = [load for load in self._serving(asked.model) if load.worker.name not in asked.tried]
        awake = [load for load in others if load.awake(now)]
        if asked.tried or not asked.request.routed:
            if not awake:
                raise self._busy("no other worker can be reached", 1.0)
            return self._take(awake, asked, now)
        free = [load for load in awake if load.requests < self._most_each]
        if free and not self._queue:
            return self._take(free, asked, now)
        if not awake and all(load.failures >= _GONE_AFTER for load in others):
            again = min((load.rests_until for load in others), default=now)
            raise self._busy("no worker can be reached", max(1.0, again - now))
        waiting = _Waiting(asked, loop.create_future())
        return await self._wait(waiting, now, bool(free))

    async def _wait(self, waiting: _Waiting, now: float, free: bool) -> Choice:
        """`free`: some worker would take it, and those who wait may be waiting for others."""
        request = waiting.asked.request
        ticket = self._queue.push(waiting, request.tenant, request.weight, request.priority, request.deadline)
        if free:
            self._wake(now)
        if (loser := self._queue.surplus()) is not None:
            self._refuse(loser.item, "too many requests wait", bool(loser.tenant))
        try:
            return await waiting.turn
        except asyncio.CancelledError:
            if not self._queue.remove(ticket) and not waiting.turn.cancelled() and waiting.turn.exception() is None:
                self.finished(waiting.turn.result(), "cancelled", asyncio.get_running_loop().time())
            raise

    def _serving(self, model: str | None) -> Sequence[Standing]:
        """Who may be asked for that model."""
        return list(self._loads.values())

    def _pick(self, among: Sequence[Standing], asked: Asked, now: float) -> tuple[Standing, Any]:
        """One of these, and the choice's note."""
        return min(among, key=lambda load: (load.requests, load.chosen)), None

    def _take(self, among: Sequence[Standing], asked: Asked, now: float) -> Choice:
        load, note = self._pick(among, asked, now)
        self._choices += 1
        load.requests += 1
        load.chosen = self._choices
        return Choice(asked.request, load.worker, note)

    def _wake(self, now: float) -> None:
        while self._queue:
            free: dict[str | None, list[Standing]] = {}  # by model

            def may(waiting: _Waiting, free: dict[str | None, list[Standing]] = free) -> bool:
                model = waiting.asked.model
                if model not in free:
                    free[model] = [
                        each for each in self._serving(model) if each.awake(now) and each.requests < self._most_each
                    ]
                return bool(free[model])

            ticket = self._queue.pop(now, may)
            if ticket is None:
                return
            waiting = ticket.item
            if not waiting.turn.done():
                waiting.turn.set_result(self._take(free[waiting.asked.model], waiting.asked, now))

    def _refuse(self, waiting: _Waiting, why: str, own_share: bool = False) -> None:
        if not waiting.turn.done():
            waiting.turn.set_exception(self._busy(why, 2.0, own_share))

    def _busy(self, why: str, retry_after_s: float, own_share: bool = False) -> Busy:
        self._counts["busy"] += 1
        return Busy(why, retry_after_s, own_share)

    def sent(self, choice: Choice, now: float) -> None:
        pass

    def first_byte(self, choice: Choice, status: int, now: float) -> None:
        self._loads[choice.worker.name].failures = 0

    def progressed(self, choice: Choice, received: bytes, now: float) -> None:
        pass

    def finished(self, choice: Choice, outcome: Outcome, now: float) -> None:
        load = self._loads[choice.worker.name]
        load.requests -= 1
        self._counts[outcome] += 1
        if outcome in _FAILURES:
            load.rests_until = now + min(_REST_S * 2**load.failures, _LONGEST_REST_S)
            load.failures = min(load.failures + 1, 10)
        self._wake(now)

    def tick(self, now: float) -> None:
        for ticket in self._queue.expired(now):
            self._refuse(ticket.item, "no worker was free in time")
        self._wake(now)

    def describe(self) -> dict[str, float]:
        numbers: dict[str, float] = {"waiting": len(self._queue)}
        numbers |= {f'running{{worker="{name}"}}': load.requests for name, load in self._loads.items()}
        return numbers | {f'outcomes{{outcome="{outcome}"}}': count for outcome, count in self._counts.items()}
