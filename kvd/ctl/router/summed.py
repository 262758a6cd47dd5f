"""What several processes of one router said, as if it were one: lists joined, counts added. Pure."""

from collections.abc import Sequence

import msgspec

from kvd.router.pages import replies
from kvd.router.pages.telling import percentages


def decisions(said: Sequence[replies.Decisions], last: int) -> replies.Decisions:
    """The newest first."""
    every = sorted((each for one in said for each in one.decisions), key=lambda each: each.age_s)
    return replies.Decisions(
        decisions=every[:last], total=sum(one.total for one in said), kept=sum(one.kept for one in said),
        processes=len(said),
    )  # fmt: skip


def workers(said: Sequence[replies.Workers]) -> replies.Workers:
    """Of a worker whose state differs between processes, the worst is shown: the one that is not serving.

    What a worker has to do each process knows from the worker itself, so the most that one of them knows is shown.
    """
    found: dict[str, replies.Worker] = {}
    for one in said:
        for worker in one.workers:
            found[worker.name] = _both(found[worker.name], worker) if worker.name in found else worker
    return msgspec.structs.replace(
        said[0], workers=[found[name] for name in sorted(found)], waiting=sum(one.waiting for one in said)
    )


def _both(one: replies.Worker, other: replies.Worker) -> replies.Worker:
    shown = one if (one.state != "serving", not one.credit) >= (other.state != "serving", not other.credit) else other
    return msgspec.structs.replace(
        shown,
        running=max(one.running, other.running),
        queued=max(one.queued, other.queued),
        queued_tokens=max(one.queued_tokens, other.queued_tokens),
        connections=one.connections + other.connections,
        recent=_recent(one.recent, other.recent),
    )


def _recent(one: replies.Recent, other: replies.Recent) -> replies.Recent:
    added = {
        name: getattr(one, name) + getattr(other, name)
        for name in replies.Recent.__struct_fields__
        if name != "within_s"
    }
    return replies.Recent(within_s=max(one.within_s, other.within_s), **added)


def ledger(said: Sequence[replies.Ledger]) -> replies.Ledger:
    causes = dict.fromkeys(cause for one in said for cause in one.lost)
    lost = {cause: sum(one.lost.get(cause, 0) for one in said) for cause in causes}
    tokens, available, achieved = (
        sum(getattr(one, name) for one in said) for name in ("tokens", "available", "achieved")
    )
    return replies.Ledger(
        requests=sum(one.requests for one in said),
        given_up=sum(one.given_up for one in said),
        tokens=tokens,
        available=available,
        achieved=achieved,
        lost=lost,
        percent=percentages(tokens, available, achieved, lost),
        processes=len(said),
    )
