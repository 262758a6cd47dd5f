"""How times, parts and prefixes of requests are written for people. Pure; "-" is not known, or not yet."""

from kvd.ctl.terminal import percent
from kvd.router.decisions import matched_words
from kvd.router.pages import replies
from kvd.router.policies.choice import Matched

ABSENT = "-"


def seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f} s"


def has(candidate: replies.Candidate) -> str:
    """Which leading tokens of the prompt a worker has: "gpu 512, ram 2048". Tiers that we do not know are left out."""
    return matched_words(Matched(**{tier: candidate.matched.get(tier, 0) for tier in Matched._fields}))


def cached(decision: replies.Decision) -> str:
    if decision.cached_tokens is None:
        return ABSENT
    return f"{decision.cached_tokens:,} ({percent(decision.cached_tokens, decision.tokens)})"


def mean(total: float, count: int) -> str:
    return seconds(total / count) if count else ABSENT


def missing(worker: replies.Worker) -> str:
    """What keeps it from being used in full; empty where nothing does."""
    return worker.health or ("" if worker.credit else worker.why or "no reason is known")


def lost(ledger: replies.Ledger) -> str:
    """To what, the most first: "routing 2.1 %, lag 0.3 %"."""
    causes = sorted(ledger.lost.items(), key=lambda each: -each[1])
    return ", ".join(f"{cause} {percent(tokens, ledger.available)}" for cause, tokens in causes if tokens) or "nothing"
