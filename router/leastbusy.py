"""The simplest steering: each request to the worker that has the fewest, and a fair queue when all have enough.

Knows nothing of prefixes. A worker that could not be reached, or died, rests for a moment that doubles each time.
One that answers errors is in doubt for such a moment: else it would get nearly everything, since it is done at once.
Who was sent to a worker before, and what does not generate, does not queue.

A steering that knows more (kvd.router.informed) says who serves a model, and which of those that are free it takes:
`_serving` and `_pick`. Whoever waits is asked about again when its turn has come, by what is known then.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvd.router.pages.metrics import named
from kvd.router.queue import FairQueue
from kvd.router.steering import Busy, Choice, Incoming, Outcome, Worker

_REST_S, _LONGEST_REST_S = 0.5, 15.0
_GONE_AFTER = 3  # failures in a row: nobody waits for such a worker
_ERRORS = 3  # answers in a row: one alone may be the request's fault, and good ones come between where it is
_WORKERS_OWN = frozenset({401, 403, 404})  # and 5xx: no worker's key, no SGLang. 400, 422, 429 are the client's
_FAILURES: frozenset[Outcome] = frozenset({"unreachable", "refused", "no_answer", "cut"})


@dataclass(slots=True)
class Standing:
    """What is known of a worker."""

    worker: Worker
    well: bool = True  # it is said to be; one that is not gets nothing while others are there
    drains: bool = False  # it gets nothing new
    requests: int = 0
    chosen: int = 0  # when it was chosen last, in choices: breaks ties
    failures: int = 0  # in a row
    rests_until: float = 0.0
    errors: int = 0  # in a row, that it answered to what generates
    doubted_until: float = 0.0  # it gets nothing while others are there: who asks for what no worker can do stops none


class Asked(msgspec.Struct, frozen=True, eq=False):
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

    # Who is there: kvd.router.fleet.crew.Crew

    def join(self, worker: Worker, well: bool) -> None:
        """It may be chosen from now on. One that is there already drains no more."""
        load = self._loads.setdefault(worker.name, Standing(worker, well))
        load.drains = False

    def well(self, name: str, well: bool) -> None:
        """A no-op for who is not there."""
        if (load := self._loads.get(name)) is not None:
            load.well = well

    def drain(self, name: str) -> None:
        """It gets nothing new, and finishes what it has. Who waits is waiting for no worker in particular."""
        if (load := self._loads.get(name)) is not None:
            load.drains = True

    def leave(self, name: str) -> None:
        """It is forgotten; what it has is nobody's load any more."""
        self._loads.pop(name, None)

    def running(self, name: str) -> int:
        load = self._loads.get(name)
        return load.requests if load is not None else 0

    async def choose(self, request: Incoming, tried: frozenset[str]) -> Choice:
        return await self._choose(Asked(request, tried))

    async def _choose(self, asked: Asked) -> Choice:
        loop = asyncio.get_running_loop()
        now = loop.time()
        others = self._staying(asked.model)
        if asked.tried:
            others = [load for load in others if load.worker.name not in asked.tried]
        awake = _awake(others, now)
        if asked.tried or not asked.request.routed:
            if not awake:
                if not others and not asked.tried:
                    raise self._busy("there is no worker", 1.0)
                raise self._busy(f"no {'other ' * bool(asked.tried)}worker can be reached", 1.0)
            return self._take(awake, asked, now)
        free = [load for load in awake if load.requests < self._most_each]
        if free and not self._queue:
            return self._take(free, asked, now)
        if not awake and all(load.failures >= _GONE_AFTER for load in others):
            again = min((load.rests_until for load in others), default=now)
            raise self._busy("no worker can be reached" if others else "there is no worker", max(1.0, again - now))
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

    def _standing(self, choice: Choice) -> Standing | None:
        """Of the worker that was chosen; None where it has left since, even if another has its name now."""
        load = self._loads.get(choice.worker.name)
        return load if load is not None and load.worker is choice.worker else None

    def _staying(self, model: str | None) -> list[Standing]:
        """Who may be given new requests for that model, now or later."""
        return [load for load in self._serving(model) if not load.drains]

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
                    awake = _awake(self._staying(model), now)
                    free[model] = [load for load in awake if load.requests < self._most_each]
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
        load = self._standing(choice)
        if load is None:
            return
        routed = choice.request.routed  # what is not: a 404 is the client's, and a 200 shows nothing of the engine
        wrong = status >= 500 or (routed and status in _WORKERS_OWN)
        if not wrong:
            load.failures = 0
        if routed and status < 400:
            load.errors, load.doubted_until = 0, 0.0
        elif routed and wrong and load.doubted_until <= now:  # until then come answers to what was sent before
            load.errors += 1
            if load.errors >= _ERRORS:
                load.doubted_until = now + _rest_s(load.errors - _ERRORS)

    def progressed(self, choice: Choice, received: bytes, now: float) -> None:
        pass

    def finished(self, choice: Choice, outcome: Outcome, now: float) -> None:
        self._counts[outcome] += 1
        if (load := self._standing(choice)) is None:
            return
        load.requests -= 1
        if outcome in _FAILURES:
            load.rests_until = now + _rest_s(load.failures)
            load.failures += 1
        self._wake(now)

    def tick(self, now: float) -> None:
        for ticket in self._queue.expired(now):
            self._refuse(ticket.item, "no worker was free in time")
        self._wake(now)

    def describe(self) -> dict[str, float]:
        numbers: dict[str, float] = {"waiting": len(self._queue)}
        numbers |= {named("running", worker=name): load.requests for name, load in self._loads.items()}
        return numbers | {f'outcomes_total{{outcome="{outcome}"}}': count for outcome, count in self._counts.items()}


def _awake(loads: Sequence[Standing], now: float) -> list[Standing]:
    """Those that may be asked now: the well ones, if there are any; of these those in no doubt, if there are any."""
    awake = [load for load in loads if load.rests_until <= now]
    awake = [load for load in awake if load.well] or awake
    return [load for load in awake if load.doubted_until <= now] or awake


def _rest_s(before: int) -> float:
    """After as many rests in a row."""
    return min(_REST_S * (1 << min(before, 10)), _LONGEST_REST_S)
