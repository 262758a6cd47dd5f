"""What every worker has to do: what was sent there and not finished, set right by what the engine says. Pure.

A worker prefills prompts in the order in which they were sent. The router knows each moment of its own requests; of
others' (another router's, a client's that goes there directly) it knows what the engine reports. A report was made at
some moment, so it is compared with what was known of that moment:

    others = reported - ours, as of then            what is there now = ours now + others

What waits takes KV memory with all of its tokens, cached or not, less what requests there have in common: that is as
much as those that ran at the report shared.

When the engine has computed more of ours than we have heard of (part of a long prompt, or a first token is on its way
to us), that is taken off the prompts that are first in line, and forgotten with them.

Always true: nothing is ever below zero; a request is counted at one worker; `MOST_LEFT` departures are remembered, a
report that is older than those is worth as much as they tell. Times are the caller's clock, reports' too.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf
from typing import Final, NamedTuple

import msgspec

from kvd.router.work import NO_WORK, Work

MOST_LEFT: Final = 512  # departures per worker, for reports that are older than them
STALE_REPORT_S: Final = 15.0  # SGLang publishes at least once a second
# A step may hold the end of one prompt and the start of the next, so prefill is measured from idle to idle, or for so
# long that the ends weigh little.
SLICE_S: Final = 4.0


class Load(msgspec.Struct, frozen=True, gc=False):
    """One worker, now."""

    queued: Work = NO_WORK  # sent and not prefilled
    head: Work = NO_WORK  # of the next that will have its first token
    head_at: float = 0.0  # since when that is being computed; says nothing where nothing waits
    running: int = 0  # have their first token, not their last
    context_tokens: int = 0  # of those
    free_tokens: int | None = None  # of KV memory when all that waits is in; below zero: some wait for it

    @property
    def requests(self) -> int:
        return self.queued.prompts + self.running


_IDLE: Final = Load()


class Report(NamedTuple):
    """What an engine says of itself: `/v1/loads`, or what it publishes. Absent figures are None."""

    made_at: float
    running: int
    waiting: int
    waiting_tokens: int  # that must be computed
    used_tokens: int  # of KV memory, cached prefixes that may leave not counted
    most_tokens: int


class Served(NamedTuple):
    """So much prefill took the worker so long, with nothing in between."""

    work: Work
    seconds: float


class _Flight(msgspec.Struct):
    worker: str
    sent_at: float
    tokens: int  # prompt and answer so far
    work: Work
    first_at: float | None = None
    left_at: float = inf


@dataclass(slots=True)
class _Others:
    """What a report says beside what was known: of others' requests, and how far the engine is ahead with ours."""

    waiting: int = 0
    tokens: int = 0
    running: int = 0  # below zero: ours have ended, and we have not heard of it
    ahead: int = 0  # of ours that wait, as far as we know, the first have their first token
    ahead_tokens: int = 0  # of theirs and the next are computed


@dataclass(slots=True)
class _Worker:
    """`fresh`, `taken`, `line` and `load` follow from the rest: kept so that a look need not walk over requests."""

    waiting: OrderedDict[str, _Flight] = field(default_factory=OrderedDict)
    whole: int = 0  # tokens of the prompts that wait, cached or not
    queued: Work = NO_WORK
    running: int = 0
    context: int = 0
    since: float = 0.0  # the head is being computed
    slice_work: Work = NO_WORK
    slice_s: float = 0.0
    flights: dict[str, _Flight] = field(default_factory=dict)
    left: deque[_Flight] = field(default_factory=lambda: deque(maxlen=MOST_LEFT))
    report: Report | None = None
    others: _Others = field(default_factory=_Others)
    sharing: float = 1.0  # KV memory that requests hold, by their tokens: what several have in common is there once
    fresh: int = 0  # that run, and were sent after the report
    taken: int = 0  # tokens of those, less those of what was sent before it, ran, and has left since
    line: tuple[Work, Work] | None = None  # what is queued by the report, and its head; None: look anew
    load: Load | None = None  # as it was believed at the last look; None: look anew
    believed: bool = False  # the report, at the last look


class ActiveLoad:
    """What is where. One for a router."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._flights: dict[str, _Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    # -- our own requests ---------------------------------------------------------------------------------

    def sent(self, request: str, worker: str, tokens: int, cached: int, now: float) -> None:
        """A prompt is on its way; `cached` of its tokens should be there already. An id that is known moves."""
        self.finished(request, now)
        there = self._at(worker)
        flight = _Flight(worker, now, tokens, Work.of(tokens, cached))
        if not there.waiting:
            there.since = now
        self._flights[request] = there.flights[request] = there.waiting[request] = flight
        there.queued = there.queued.plus(flight.work)
        there.whole += tokens
        there.line = there.load = None

    def first_token(self, request: str, now: float, cached: int | None = None) -> Served | None:
        """Its prefill is over, and the engine may have said how much was cached.

        Now and then that says how fast the worker is.
        """
        flight = self._flights.get(request)
        if flight is None or flight.first_at is not None:
            return None
        there = self._workers[flight.worker]
        self._no_longer_waits(request, flight, there)
        flight.first_at = now
        there.running += 1
        there.context += flight.tokens
        if _fresh(flight, there):
            there.fresh += 1
            there.taken += flight.tokens
        there.slice_work = there.slice_work.plus(flight.work if cached is None else Work.of(flight.tokens, cached))
        there.slice_s += now - there.since
        there.since = now
        if there.slice_s < SLICE_S and there.waiting:
            return None
        served = Served(there.slice_work, there.slice_s)
        there.slice_work, there.slice_s = NO_WORK, 0.0
        return served

    def progressed(self, request: str, tokens: int) -> None:
        """So many more tokens of the answer came."""
        flight = self._flights.get(request)
        if flight is None:
            return
        flight.tokens += tokens
        there = self._workers[flight.worker]
        there.load = None
        if flight.first_at is None:
            there.whole += tokens
            return
        there.context += tokens
        if _fresh(flight, there):
            there.taken += tokens

    def finished(self, request: str, now: float) -> None:
        """It is over, whatever became of it."""
        flight = self._flights.pop(request, None)
        if flight is None:
            return
        there = self._workers[flight.worker]
        del there.flights[request]
        if flight.first_at is None:
            self._no_longer_waits(request, flight, there)
            there.slice_work, there.slice_s, there.since = NO_WORK, 0.0, now
        else:
            there.running -= 1
            there.context -= flight.tokens
            there.fresh -= _fresh(flight, there)
            if there.report is not None and now > there.report.made_at:
                there.taken -= flight.tokens
        flight.left_at = now
        there.left.append(flight)
        there.load = None

    def forget(self, worker: str) -> None:
        """The worker has gone, and what was there with it."""
        there = self._workers.pop(worker, None)
        for request in there.flights if there is not None else ():
            del self._flights[request]

    # -- what the engine says -----------------------------------------------------------------------------

    def reported(self, worker: str, report: Report) -> None:
        """One that is older than the last is not heard."""
        there = self._at(worker)
        if there.report is not None and report.made_at <= there.report.made_at:
            return
        there.report = report
        waiting = tokens = running = context = 0
        for flight in _present(there, report.made_at):
            if flight.first_at is None or flight.first_at > report.made_at:
                waiting += 1
                tokens += flight.work.tokens
            else:
                running += 1
                context += flight.tokens
        there.sharing = min(1.0, report.used_tokens / context) if context and report.running == running else 1.0
        more, more_tokens = report.waiting - waiting, report.waiting_tokens - tokens
        # Engines count a prefix that one in line brings for the next as work of both, or guess by their hit rate: of
        # our own prompts we know better, and all that are more are others' only as far as their number goes.
        theirs = report.waiting_tokens * max(0, more) // max(1, report.waiting)
        there.others = _Others(
            max(0, more),
            max(0, min(more_tokens, theirs)),
            report.running - running,
            max(0, -more),
            max(0, -more_tokens),
        )
        there.fresh, there.taken = _since(there, report.made_at)
        there.line = there.load = None

    def at(self, worker: str, now: float) -> Load:
        """A worker that nobody has heard of is idle. The same object as long as nothing happens there."""
        there = self._workers.get(worker)
        if there is None:
            return _IDLE
        report, load = there.report, there.load
        believed = report is not None and now - report.made_at <= STALE_REPORT_S
        if load is None or there.believed is not believed:
            load = there.load = _corrected(there, report) if report is not None and believed else _own(there)
            there.believed = believed
        return load

    # -- inside -------------------------------------------------------------------------------------------

    def _at(self, worker: str) -> _Worker:
        there = self._workers.get(worker)
        if there is None:
            there = self._workers[worker] = _Worker()
        return there

    @staticmethod
    def _no_longer_waits(request: str, flight: _Flight, there: _Worker) -> None:
        del there.waiting[request]
        there.queued = there.queued.minus(flight.work) if there.waiting else NO_WORK
        there.whole -= flight.tokens
        there.line = there.load = None
        if there.report is None or _fresh(flight, there):
            return
        others = there.others
        others.ahead_tokens = max(0, others.ahead_tokens - flight.work.tokens)
        if others.ahead:
            others.ahead -= 1
            others.running -= 1


def _fresh(flight: _Flight, there: _Worker) -> bool:
    """Whether it was sent after the worker's report."""
    return there.report is not None and flight.sent_at > there.report.made_at


def _present(there: _Worker, at: float) -> Iterator[_Flight]:
    """Our requests that were at the worker at that moment."""
    yield from (flight for flight in there.flights.values() if flight.sent_at <= at)
    yield from (left for left in there.left if left.sent_at <= at < left.left_at)


def _since(there: _Worker, at: float) -> tuple[int, int]:
    """`fresh` and `taken` of a report of that moment."""
    fresh = taken = 0
    for flight in takewhile(lambda flight: flight.sent_at > at, reversed(there.flights.values())):
        if flight.first_at is not None:
            fresh += 1
            taken += flight.tokens
    for left in takewhile(lambda left: left.left_at > at, reversed(there.left)):
        if left.sent_at <= at and left.first_at is not None:
            taken -= left.tokens
    return fresh, taken


def _own(there: _Worker) -> Load:
    """What is known without a report."""
    head = next(iter(there.waiting.values())).work if there.waiting else NO_WORK
    return Load(there.queued, head, there.since if there.waiting else 0.0, there.running, there.context)


def _corrected(there: _Worker, report: Report) -> Load:
    """What is ours and sent since is certain; the rest is what the engine said, less what has ended since."""
    others = there.others
    queued, head = there.line = there.line or _line(there, report)
    running = max(there.fresh, there.running + others.running)
    each = report.used_tokens / max(1, report.running + report.waiting)
    claimed = report.used_tokens + there.taken + round(there.sharing * there.whole) + others.tokens
    # What was done before the report is not waiting any more.
    since = max(there.since, report.made_at) if there.waiting else 0.0
    return Load(
        queued,
        head,
        since,
        running,
        max(0, there.context + round(each * (running - there.running))),
        min(report.most_tokens, report.most_tokens - claimed),
    )


def _line(there: _Worker, report: Report) -> tuple[Work, Work]:
    """What is queued, and the head of it: of ours that wait the first are computed as far as the engine is ahead."""
    others, queued, head, ahead = there.others, there.queued, NO_WORK, there.others.ahead_tokens
    for flight in there.waiting.values():
        head = flight.work.rest(ahead) if ahead else flight.work
        if ahead:
            queued = queued.minus(flight.work).plus(head)
            ahead -= flight.work.tokens - head.tokens
        if head.tokens or flight.sent_at > report.made_at:
            break
    if others.waiting:
        queued = queued.plus(Work(others.waiting, others.tokens, others.tokens * others.tokens / others.waiting / 2))
    return queued, head
