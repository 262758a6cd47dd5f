"""One worker's requests of ours, and what a report of its engine says beside them. Pure.

See kvd.router.activeload for how both are put together. Here is what follows from them: by walks over the requests
where a report comes (`present`, `since`), from what was counted ever after (`own`, `corrected`).
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf
from typing import Final

import msgspec

from kvd.router.load import Load, Report
from kvd.router.work import NO_WORK, Work

MOST_LEFT: Final = 512  # departures per worker, for reports that are older than them


class Flight(msgspec.Struct):
    worker: str
    sent_at: float
    tokens: int  # prompt and answer so far
    work: Work
    load_s: float = 0.0  # until what is in tiers is on its GPU: `loaded` tokens, which are not in `work`
    loaded: int = 0
    first_at: float | None = None
    left_at: float = inf

    def loading_s(self, work: Work) -> float:
        """Of `load_s`, when this was what the engine computed: what it computed itself it did not load."""
        if not self.loaded:
            return self.load_s
        return self.load_s * min(1.0, max(0.0, 1.0 - (work.tokens - self.work.tokens) / self.loaded))


@dataclass(slots=True)
class Others:
    """What a report says beside what was known: of others' requests, and how far the engine is ahead with ours."""

    waiting: int = 0
    tokens: int = 0
    running: int = 0  # below zero: ours have ended, and we have not heard of it
    ahead: int = 0  # of ours that wait, as far as we know, the first have their first token
    ahead_tokens: int = 0  # of theirs and the next are computed


@dataclass(slots=True)
class There:
    """`fresh`, `taken`, `line` and `load` follow from the rest: kept so that a look need not walk over requests."""

    waiting: OrderedDict[str, Flight] = field(default_factory=OrderedDict)
    whole: int = 0  # tokens of the prompts that wait, cached or not
    queued: Work = NO_WORK
    running: int = 0
    context: int = 0
    since: float = 0.0  # the head is being computed
    guessed: bool = False  # `since`, from when a first token was expected that nobody saw
    slice_work: Work = NO_WORK
    slice_s: float = 0.0
    slice_load_s: float = 0.0  # of it, or at the same time as some of it
    flights: dict[str, Flight] = field(default_factory=dict)
    left: deque[Flight] = field(default_factory=lambda: deque(maxlen=MOST_LEFT))
    report: Report | None = None
    others: Others = field(default_factory=Others)
    sharing: float = 1.0  # KV memory that requests hold, by their tokens: what several have in common is there once
    fresh: int = 0  # that run, and were sent after the report
    taken: int = 0  # tokens of those, less those of what was sent before it, ran, and has left since
    line: tuple[Work, Work] | None = None  # what is queued by the report, and its head; None: look anew
    load: Load | None = None  # as it was believed at the last look; None: look anew
    believed: bool = False  # the report, at the last look

    def begin_slice(self, now: float) -> None:
        """What was served before is told, or nobody knows how long it took."""
        self.slice_work, self.slice_s, self.slice_load_s, self.since = NO_WORK, 0.0, 0.0, now


def fresh(flight: Flight, there: There) -> bool:
    """Whether it was sent after the worker's report."""
    return there.report is not None and flight.sent_at > there.report.made_at


def present(there: There, at: float) -> Iterator[Flight]:
    """Our requests that were at the worker at that moment."""
    yield from (flight for flight in there.flights.values() if flight.sent_at <= at)
    yield from (left for left in there.left if left.sent_at <= at < left.left_at)


def since(there: There, at: float) -> tuple[int, int]:
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


def own(there: There) -> Load:
    """What is known without a report."""
    head = next(iter(there.waiting.values())).work if there.waiting else NO_WORK
    since = there.since if there.waiting else 0.0
    return Load(there.queued, head, since, there.running, there.context, held_tokens=there.context)


def corrected(there: There, report: Report) -> Load:
    """What is ours and sent since is certain; the rest is what the engine said, less what has ended since."""
    others = there.others
    queued, head = there.line = there.line or _line(there, report)
    running = max(there.fresh, there.running + others.running)
    each = report.used_tokens / max(1, report.running + report.waiting)
    context = max(0, there.context + round(each * (running - there.running)))
    claimed = report.used_tokens + round(there.sharing * (there.taken + there.whole)) + others.tokens
    # What was done before the report is not waiting any more.
    since = max(there.since, report.made_at) if there.waiting else 0.0
    return Load(
        queued,
        head,
        since,
        running,
        context,
        min(report.most_tokens, report.most_tokens - claimed) if report.most_tokens else None,  # 0: not said
        round(there.sharing * context),
    )


def _line(there: There, report: Report) -> tuple[Work, Work]:
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


def faults(there: There) -> list[str]:
    """What was counted and is not what a walk finds. Of departures since the report a walk knows the last only."""
    waiting, running = there.waiting, [one for one in there.flights.values() if one.first_at is not None]
    pairs = {
        "whole": (there.whole, sum(flight.tokens for flight in waiting.values())),
        "queued": (there.queued.tokens, sum(flight.work.tokens for flight in waiting.values())),
        "running": (there.running, len(running)),
        "context": (there.context, sum(flight.tokens for flight in running)),
    }
    if there.report is not None and len(there.left) < MOST_LEFT:
        found = since(there, there.report.made_at)
        pairs |= {"fresh": (there.fresh, found[0]), "taken": (there.taken, found[1])}
    return [f"{name} is {counted}, not {found}" for name, (counted, found) in pairs.items() if counted != found]
