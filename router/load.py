"""What every worker has to do: what was sent there and not finished, set right by what the engine says. Pure.

A worker prefills prompts in the order in which they were sent. The router knows each moment of its own requests; of
others' (another router's, a client's that goes there directly) it knows what the engine reports. A report was made at
some moment, so it is compared with what was known of that moment:

    others = reported - ours, as of then            what is there now = ours now + others

When the engine has computed more of ours than we have heard of (part of a long prompt, or a first token is on its way
to us), that is taken off the prompts that are first in line, and forgotten with them.

Always true: nothing is ever below zero; a request is counted at one worker; `MOST_LEFT` departures are remembered, a
report that is older than those is worth as much as they tell. Times are the caller's clock, reports' too.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final, NamedTuple

from kvd.router.work import NO_WORK, Work

MOST_LEFT: Final = 512  # departures per worker, for reports that are older than them
STALE_REPORT_S: Final = 15.0  # SGLang publishes at least once a second
# A step may hold the end of one prompt and the start of the next, so prefill is measured from idle to idle, or for so
# long that the ends weigh little.
SLICE_S: Final = 4.0


class Load(NamedTuple):
    """One worker, now."""

    queued: Work = NO_WORK  # sent and not prefilled
    head: Work = NO_WORK  # of the next that will have its first token
    head_s: float = 0.0  # for how long that has been computed
    running: int = 0  # have their first token, not their last
    context_tokens: int = 0  # of those
    free_tokens: int | None = None  # of KV memory when all that waits is in; below zero: some wait for it

    @property
    def requests(self) -> int:
        return self.queued.prompts + self.running


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


@dataclass(slots=True)
class _Flight:
    worker: str
    sent_at: float
    tokens: int  # prompt and answer so far
    work: Work
    first_at: float | None = None


class _Left(NamedTuple):
    flight: _Flight
    at: float


@dataclass(slots=True)
class _Others:
    """What a report says beside what was known: of others' requests, and how far the engine is ahead with ours."""

    waiting: int = 0
    tokens: int = 0
    running: int = 0  # below zero: ours have ended, and we have not heard of it
    ahead: int = 0  # of ours that wait, as far as we know, the first have their first token
    ahead_tokens: int = 0  # of theirs and the next are computed
    fresh: int = 0  # of ours, sent since the report, that run
    taken: int = 0  # tokens of KV memory that those have, less what has been given back since the report


@dataclass(slots=True)
class _Worker:
    waiting: OrderedDict[str, _Flight] = field(default_factory=OrderedDict)
    queued: Work = NO_WORK
    running: int = 0
    context: int = 0
    since: float = 0.0  # the head is being computed
    slice_work: Work = NO_WORK
    slice_s: float = 0.0
    flights: dict[str, _Flight] = field(default_factory=dict)
    left: deque[_Left] = field(default_factory=lambda: deque(maxlen=MOST_LEFT))
    report: Report | None = None
    others: _Others = field(default_factory=_Others)


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
        there = self._workers.setdefault(worker, _Worker())
        flight = _Flight(worker, now, tokens, Work.of(tokens, cached))
        if not there.waiting:
            there.since = now
        self._flights[request] = there.flights[request] = there.waiting[request] = flight
        there.queued = there.queued.plus(flight.work)

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
        if _since(flight, there):
            there.others.fresh += 1
            there.others.taken += flight.tokens
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
        if flight is not None:
            flight.tokens += tokens
            if flight.first_at is not None:
                there = self._workers[flight.worker]
                there.context += tokens
                if _since(flight, there):
                    there.others.taken += tokens

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
            there.others.fresh -= _since(flight, there)
            there.others.taken -= flight.tokens
        there.left.append(_Left(flight, now))

    def forget(self, worker: str) -> None:
        """The worker has gone, and what was there with it."""
        there = self._workers.pop(worker, None)
        for request in there.flights if there is not None else ():
            del self._flights[request]

    # -- what the engine says -----------------------------------------------------------------------------

    def reported(self, worker: str, report: Report) -> None:
        """One that is older than the last is not heard."""
        there = self._workers.setdefault(worker, _Worker())
        if there.report is not None and report.made_at <= there.report.made_at:
            return
        there.report = report
        waiting = tokens = running = 0
        for flight in _present(there, report.made_at):
            if flight.first_at is None or flight.first_at > report.made_at:
                waiting += 1
                tokens += flight.work.tokens
            else:
                running += 1
        more, more_tokens = report.waiting - waiting, report.waiting_tokens - tokens
        there.others = _Others(
            max(0, more), max(0, more_tokens), report.running - running, max(0, -more), max(0, -more_tokens),
            *_fresh(there, report.made_at),
        )  # fmt: skip

    def at(self, worker: str, now: float) -> Load:
        """A worker that nobody has heard of is idle."""
        there = self._workers.get(worker)
        if there is None:
            return Load()
        head, head_s = NO_WORK, 0.0
        if there.waiting:
            head, head_s = next(iter(there.waiting.values())).work, now - there.since
        report = there.report
        if report is None or now - report.made_at > STALE_REPORT_S:
            return Load(there.queued, head, head_s, there.running, there.context)
        return _corrected(there, report, head, head_s)

    # -- inside -------------------------------------------------------------------------------------------

    @staticmethod
    def _no_longer_waits(request: str, flight: _Flight, there: _Worker) -> None:
        del there.waiting[request]
        there.queued = there.queued.minus(flight.work) if there.waiting else NO_WORK
        others = there.others
        if there.report is None or flight.sent_at > there.report.made_at:
            return
        others.ahead_tokens = max(0, others.ahead_tokens - flight.work.tokens)
        if others.ahead:
            others.ahead -= 1
            others.running -= 1


def _present(there: _Worker, at: float) -> Iterator[_Flight]:
    """Our requests that were at the worker at that moment."""
    yield from (flight for flight in there.flights.values() if flight.sent_at <= at)
    yield from (left.flight for left in there.left if left.flight.sent_at <= at < left.at)


def _since(flight: _Flight, there: _Worker) -> bool:
    """Whether the last report does not know of it."""
    return there.report is None or flight.sent_at > there.report.made_at


def _fresh(there: _Worker, at: float) -> tuple[int, int]:
    """`fresh` and `taken` of a report that was made at that moment."""
    running = taken = 0
    for flight in takewhile(lambda flight: flight.sent_at > at, reversed(there.flights.values())):
        if flight.first_at is not None:
            running += 1
            taken += flight.tokens
    for left in takewhile(lambda left: left.at > at, reversed(there.left)):
        if left.flight.sent_at <= at and left.flight.first_at is not None:
            taken -= left.flight.tokens
    return running, taken


def _corrected(there: _Worker, report: Report, head: Work, head_s: float) -> Load:
    """What is ours and sent since is certain; the rest is what the engine said, less what has ended since."""
    others, queued = there.others, there.queued
    if others.ahead_tokens:
        ahead = others.ahead_tokens
        for flight in there.waiting.values():
            head = flight.work.rest(ahead)
            queued = queued.minus(flight.work).plus(head)
            ahead -= flight.work.tokens - head.tokens
            if head.tokens or flight.sent_at > report.made_at:
                break
    if there.waiting and there.since < report.made_at:  # what was done before is not waiting any more
        head_s -= report.made_at - there.since
    if others.waiting:
        queued = queued.plus(Work(others.waiting, others.tokens, others.tokens * others.tokens / others.waiting / 2))
    elif others.tokens and queued.tokens:  # less of ours is cached there than we think
        queued = Work(
            queued.prompts, queued.tokens + others.tokens, queued.pairs * (1 + others.tokens / queued.tokens)
        )
    running, context = max(others.fresh, there.running + others.running), there.context
    if running != there.running:
        each = report.used_tokens / max(1, report.running + report.waiting)
        context = max(0, context + round(each * (running - there.running)))
    free = min(report.most_tokens, report.most_tokens - report.used_tokens - others.taken - queued.tokens)
    return Load(queued, head, head_s, running, context, free)
