"""What a policy is asked and what it answers. Pure.

A policy gets every worker that may take the request and ranks them. It may keep state of its own (whose turn it is);
what it was told is the caller's, and what becomes of the request it is not told.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

import msgspec
from msgspec.structs import asdict

from kvd.router.load import Load
from kvd.router.work import Request

Draw = Callable[[], float]  # at random from 0.0 up to 1.0: chance arrives as an argument


class Matched(NamedTuple):
    """Leading tokens of the prompt that a worker has, by where; a tier may hold more of it than the one above."""

    gpu: int = 0
    ram: int = 0
    nvme: int = 0
    shared: int = 0
    expected: int = 0  # will be on the GPU when it is this prompt's turn: see kvd.router.predicted


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A worker that may take the request."""

    worker: str
    matched: Matched
    load: Load


class Scored(msgspec.Struct, frozen=True, gc=False):
    """A candidate's cost, the less the better, and what it is made of: names and figures to show to people.

    `ttft_s`: when the first token is expected, if the policy knows; then cost and figures are seconds too.
    `made_of`: the figures by name, or a record whose fields they are.
    """

    candidate: Candidate
    cost: float
    made_of: Mapping[str, float] | msgspec.Struct
    ttft_s: float | None = None

    @property
    def terms(self) -> Mapping[str, float]:
        """The figures by name."""
        return asdict(self.made_of) if isinstance(self.made_of, msgspec.Struct) else self.made_of


class Choice(msgspec.Struct, frozen=True):
    """All candidates, the best first."""

    policy: str
    ranked: tuple[Scored, ...]

    @property
    def winner(self) -> Scored:
        return self.ranked[0]

    @property
    def worker(self) -> str:
        return self.ranked[0].candidate.worker


class Policy(Protocol):
    """One way to choose."""

    name: str

    def choose(self, request: Request, candidates: Sequence[Candidate], now: float) -> Choice:
        """Rank them; there is at least one. Does not block."""
        ...


_cost = attrgetter("cost")


def by_cost(policy: str, scored: Sequence[Scored], tie: Callable[[Scored], object]) -> Choice:
    """The least cost first; among equals what `tie` puts first. It is asked only where there are any."""
    if len({each.cost for each in scored}) == len(scored):
        return Choice(policy, tuple(sorted(scored, key=_cost)))
    return Choice(policy, tuple(sorted(scored, key=lambda each: (each.cost, tie(each)))))
