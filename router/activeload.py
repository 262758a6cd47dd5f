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

from typing import Final, NamedTuple

from kvd.router.flights import Flight, Others, There, corrected, faults, fresh, own, present, since
from kvd.router.load import Load, Report
from kvd.router.work import NO_WORK, Work

STALE_REPORT_S: Final = 15.0  # SGLang publishes at least once a second
# A step may hold the end of one prompt and the start of the next, so prefill is measured from idle to idle, or for so
# long that the ends weigh little.
SLICE_S: Final = 4.0
_MOST_LOADING: Final = 0.5  # of a slice with several prompts
_IDLE: Final = Load()


class Served(NamedTuple):
    """So much prefill took the worker so long, with nothing in between."""

    work: Work
    seconds: float


class ActiveLoad:
    """What is where. One for a router."""

    def __init__(self) -> None:
        self._workers: dict[str, There] = {}
        self._flights: dict[str, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    # -- our own requests ---------------------------------------------------------------------------------

    def sent(
        self, request: str, worker: str, tokens: int, cached: int, now: float, load_s: float = 0.0, loaded: int = 0
    ) -> None:
        """A prompt is on its way; `cached` of its tokens need not be computed. An id that is known moves.

        `loaded` of those are in tiers below the GPU, which takes `load_s`.
        """
        self.finished(request, now)
        there = self._at(worker)
        flight = Flight(worker, now, tokens, Work.of(tokens, cached), load_s, loaded)
        if not there.waiting:
            there.since, there.guessed = now, False
        self._flights[request] = there.flights[request] = there.waiting[request] = flight
        there.queued = there.queued.plus(flight.work)
        there.whole += tokens
        there.line = there.load = None

    def first_token(self, request: str, now: float, cached: int | None = None, guessed: bool = False) -> Served | None:
        """Its prefill is over, and the engine may have said how much was cached.

        Now and then that says how fast the worker is. Where it is `guessed`, as nobody sees that token, nothing that
        was served with it or right after it does.
        """
        flight = self._flights.get(request)
        if flight is None or flight.first_at is not None:
            return None
        there = self._workers[flight.worker]
        self._no_longer_waits(request, flight, there)
        flight.first_at = now
        there.running += 1
        there.context += flight.tokens
        if fresh(flight, there):
            there.fresh += 1
            there.taken += flight.tokens
        if guessed or there.guessed:
            there.begin_slice(now)
            there.guessed = guessed
            return None
        work = flight.work if cached is None else Work.of(flight.tokens, cached)
        there.slice_work = there.slice_work.plus(work)
        there.slice_s += now - there.since
        there.slice_load_s += flight.loading_s(work)
        there.since = now
        if there.slice_s < SLICE_S and there.waiting:
            return None
        served = _served(there)
        there.begin_slice(now)
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
        if fresh(flight, there):
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
            there.begin_slice(now)
        else:
            there.running -= 1
            there.context -= flight.tokens
            there.fresh -= fresh(flight, there)
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
        for flight in present(there, report.made_at):
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
        there.others = Others(
            max(0, more),
            max(0, min(more_tokens, theirs)),
            report.running - running,
            max(0, -more),
            max(0, -more_tokens),
        )
        there.fresh, there.taken = since(there, report.made_at)
        there.line = there.load = None

    def at(self, worker: str, now: float) -> Load:
        """A worker that nobody has heard of is idle. The same object as long as nothing happens there."""
        there = self._workers.get(worker)
        if there is None:
            return _IDLE
        report, load = there.report, there.load
        believed = report is not None and now - report.made_at <= STALE_REPORT_S
        if load is None or there.believed is not believed:
            load = there.load = corrected(there, report) if report is not None and believed else own(there)
            there.believed = believed
        return load

    def faults(self) -> list[str]:
        """What was counted and is not what a walk finds; nothing."""
        return [f"{name}: {fault}" for name, there in self._workers.items() for fault in faults(there)]

    # -- inside -------------------------------------------------------------------------------------------

    def _at(self, worker: str) -> There:
        there = self._workers.get(worker)
        if there is None:
            there = self._workers[worker] = There()
        return there

    @staticmethod
    def _no_longer_waits(request: str, flight: Flight, there: There) -> None:
        del there.waiting[request]
        there.queued = there.queued.minus(flight.work) if there.waiting else NO_WORK
        there.whole -= flight.tokens
        there.line = there.load = None
        if there.report is None or fresh(flight, there):
            return
        others = there.others
        others.ahead_tokens = max(0, others.ahead_tokens - flight.work.tokens)
        if others.ahead:
            others.ahead -= 1
            others.running -= 1


def _served(there: There) -> Served | None:
    """What a slice says: of the time that computing took, not loading.

    What one of several prompts is loaded in, others may be computed in: nobody knows what is left of such a slice if
    loading is most of it.
    """
    if there.slice_work.prompts > 1 and there.slice_load_s > _MOST_LOADING * there.slice_s:
        return None
    return Served(there.slice_work, max(0.0, there.slice_s - there.slice_load_s))
