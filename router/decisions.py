"""What was decided lately, and what came of it, for `kvdctl explain` and GET /kvd/decisions. Pure, bounded.

A decision is kept with all its candidates' terms (the best `MOST_SHOWN` of them), and is told when its request has its
first token, how much was cached, and how it ended.

Always true: at most `MOST` decisions are kept, whatever clients send; `total` counts those that fell out too. Of a
request that is sent a second time, and of two whose clients gave them the same id, both decisions are kept, each is
told its own, and the later one is found.
"""

from collections import deque
from itertools import islice
from typing import Final

import msgspec

from kvd.router.policies.choice import Choice, Matched, Scored
from kvd.router.work import Request

MOST: Final = 1024
MOST_SHOWN: Final = 32  # candidates
_WORTH_SAYING_S: Final = 0.001


class Made(msgspec.Struct):
    """One decision. Times are the router's clock; None is not known, or not yet."""

    request: str
    at: float
    tokens: int
    policy: str
    ranked: tuple[Scored, ...]
    candidates: int
    first_at: float | None = None
    cached: int | None = None  # tokens, as the engine says
    ended_at: float | None = None
    outcome: str = ""
    tried: tuple[str, ...] = ()  # workers that failed it before this decision
    unknown: str = ""  # why its tokens are not known: `tokens` is a guess then

    def first_token(self, now: float) -> None:
        self.first_at = now

    def ended(self, now: float, outcome: str, cached: int | None = None) -> None:
        """`outcome` in a word or two; `cached` tokens where the engine says them."""
        self.ended_at, self.outcome, self.cached = now, outcome, cached

    @property
    def worker(self) -> str:
        return self.ranked[0].candidate.worker

    @property
    def predicted_ttft_s(self) -> float | None:
        return self.ranked[0].ttft_s

    @property
    def actual_ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.at


class Decisions:
    """The last decisions, to be found by their request."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._made: deque[Made] = deque()
        self._of: dict[str, Made] = {}
        self.total = 0

    def __len__(self) -> int:
        return len(self._made)

    def add(self, request: Request, choice: Choice, now: float, tried: tuple[str, ...] = ()) -> Made:
        """The request goes to the first of the ranking."""
        ranked = choice.ranked[:MOST_SHOWN]
        made = Made(request.id, now, request.tokens, choice.policy, ranked, len(choice.ranked), tried=tried)
        self._made.append(made)
        self._of[request.id] = made
        self.total += 1
        if len(self._made) > self._most:
            oldest = self._made.popleft()
            if self._of.get(oldest.request) is oldest:
                del self._of[oldest.request]
        return made

    def find(self, request: str) -> Made | None:
        """None: never seen, or too long ago."""
        return self._of.get(request)

    def last(self, count: int) -> list[Made]:
        """Up to `count`, the newest first."""
        return list(islice(reversed(self._made), max(0, count)))


def why(made: Made) -> str:
    """Why the winner won, in a sentence."""
    winner = made.ranked[0]
    if len(made.ranked) == 1:
        return f"{made.worker} was the only one that could take it"
    second = made.ranked[1]
    ours, others = winner.terms, second.terms
    gains = {name: others.get(name, 0.0) - ours.get(name, 0.0) for name in dict.fromkeys((*ours, *others))}
    if winner.cost == second.cost:
        return f"{made.worker} and {second.candidate.worker} cost the same; chance or free memory decided"
    known = winner.ttft_s is not None
    said = [
        f"{name} {_figure(-gain, known)}"
        for name, gain in sorted(gains.items(), key=lambda item: -abs(item[1]))
        if abs(gain) >= _WORTH_SAYING_S
    ]
    parts = f" ({', '.join(said)})" if said else ""
    by = _figure(second.cost - winner.cost, known).lstrip("+")
    return f"{made.worker} costs {by} less than {second.candidate.worker}{parts}"


def matched_words(matched: Matched) -> str:
    """Which of the prompt's leading tokens are where: "gpu 512, ram 2048", or "nothing"."""
    return ", ".join(f"{tier} {tokens}" for tier, tokens in matched._asdict().items() if tokens) or "nothing"


def _figure(value: float, seconds: bool) -> str:
    return f"{value:+.3f} s" if seconds else f"{value:+g}"
