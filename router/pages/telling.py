"""From what the router knows to what its pages say. Pure: the time arrives as a number.

Bounded whatever is asked for: `MOST_LISTED` decisions with their `MOST_SHOWN` best candidates; of one request, all
that was kept. More would hold up the streams that this process serves.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from typing import Final

from kvd.router.decisions import Decisions, Made, why
from kvd.router.ledger import Ledger
from kvd.router.load import Load
from kvd.router.pages import replies
from kvd.router.pages.told import Member
from kvd.router.policies.choice import Scored

MOST_LISTED: Final = 100
MOST_SHOWN: Final = 8
RECENT_S: Final = 60.0


def listed(decisions: Decisions, last: int, now: float) -> list[replies.Decision]:
    """The newest first."""
    return [_decision(made, MOST_SHOWN, now) for made in decisions.last(min(last, MOST_LISTED))]


def of_request(decisions: Decisions, request: str, now: float) -> list[replies.Decision]:
    """All that is kept of one request, the newest first: more than one where it was sent again."""
    if decisions.find(request) is None:
        return []
    return [
        _decision(made, len(made.ranked), now) for made in decisions.last(len(decisions)) if made.request == request
    ]


def _decision(made: Made, most: int, now: float) -> replies.Decision:
    return replies.Decision(
        request=made.request,
        age_s=now - made.at,
        policy=made.policy,
        tokens=made.tokens,
        worker=made.worker,
        why=why(made),
        ranked=[_candidate(scored) for scored in made.ranked[:most]],
        candidates=made.candidates,
        predicted_ttft_s=made.predicted_ttft_s,
        actual_ttft_s=made.actual_ttft_s,
        cached_tokens=made.cached,
        took_s=None if made.ended_at is None else made.ended_at - made.at,
        outcome=made.outcome,
        unknown=made.unknown,
    )


def _candidate(scored: Scored) -> replies.Candidate:
    one, load = scored.candidate, scored.candidate.load
    return replies.Candidate(
        one.worker, one.matched._asdict(), scored.cost, dict(scored.terms), scored.ttft_s, load.running,
        load.queued.prompts, load.queued.tokens,
    )  # fmt: skip


def workers(
    members: Iterable[Member], load: Callable[[str], Load], connections: Mapping[str, int],
    recent: Mapping[str, replies.Recent],
) -> list[replies.Worker]:  # fmt: skip
    """By name."""
    shown = []
    for member in sorted(members, key=lambda member: member.name):
        now = load(member.name)
        shown.append(
            replies.Worker(
                name=member.name,
                state=member.state,
                credit=member.credit,
                model=member.model,
                node=member.node,
                why=member.why,
                remedy=member.remedy,
                running=now.running,
                queued=now.queued.prompts,
                queued_tokens=now.queued.tokens,
                connections=connections.get(member.name, 0),
                recent=recent.get(member.name, replies.Recent(RECENT_S)),
                health=member.health,
                parity=member.parity,
                origin=member.origin,
            )
        )
    return shown


def recent(decisions: Decisions, now: float) -> dict[str, replies.Recent]:
    """By worker, what became of the decisions that are kept and not older than `RECENT_S`."""
    kept = decisions.last(len(decisions))
    within_s = min(RECENT_S, now - kept[-1].at) if decisions.total > len(kept) else RECENT_S
    made_at: dict[str, list[Made]] = {}
    for made in takewhile(lambda made: now - made.at <= RECENT_S, kept):
        made_at.setdefault(made.worker, []).append(made)
    return {worker: _summed(made, within_s) for worker, made in made_at.items()}


def _summed(made: list[Made], within_s: float) -> replies.Recent:
    counted = [(each.tokens, each.cached) for each in made if each.cached is not None]
    times = [(each.predicted_ttft_s, each.actual_ttft_s) for each in made]
    timed = [(predicted, actual) for predicted, actual in times if predicted is not None and actual is not None]
    return replies.Recent(
        within_s=within_s,
        requests=len(made),
        counted=len(counted),
        tokens=sum(tokens for tokens, _ in counted),
        cached_tokens=sum(cached for _, cached in counted),
        timed=len(timed),
        predicted_ttft_s=sum(predicted for predicted, _ in timed),
        actual_ttft_s=sum(actual for _, actual in timed),
    )


def ledger(totals: Ledger) -> replies.Ledger:
    lost = {str(cause): tokens for cause, tokens in totals.lost.items()}
    return replies.Ledger(
        requests=totals.requests,
        given_up=totals.given_up,
        tokens=totals.tokens,
        available=totals.available,
        achieved=totals.achieved,
        lost=lost,
        percent=percentages(totals.tokens, totals.available, totals.achieved, lost),
    )


def percentages(tokens: int, available: int, achieved: int, lost: Mapping[str, int]) -> dict[str, float]:
    """Available of all tokens, the rest of those available; 0 where there is nothing to be a part of."""

    def part(count: int, whole: int) -> float:
        return round(100 * count / whole, 2) if whole else 0.0

    shares = {"available": part(available, tokens), "achieved": part(achieved, available)}
    return shares | {f"lost_to_{cause}": part(count, available) for cause, count in lost.items()}
