"""What a router has to tell of itself: who knows it. The interface between the pages and the parts they show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvd.router.decisions import Decisions
from kvd.router.ledger import Ledger
from kvd.router.load import Load


class Member(Protocol):
    """A worker, as the fleet sees it; what the fields mean says kvd.router.pages.replies.Worker."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def node(self) -> str: ...
    @property
    def credit(self) -> bool: ...
    @property
    def why(self) -> str: ...
    @property
    def remedy(self) -> str: ...
    @property
    def health(self) -> str: ...
    @property
    def parity(self) -> str: ...
    @property
    def origin(self) -> str: ...


class Fleet(Protocol):
    """Who is there. The changes answer at once and raise KvdError with the remedy."""

    def members(self) -> Sequence[Member]: ...

    def add(self, url: str) -> object:
        """A worker joins; it is served once it answers."""

    def drain(self, name: str) -> object:
        """It gets nothing new, finishes what it has, and leaves."""

    def remove(self, name: str) -> object:
        """It leaves at once; what it was answering goes on elsewhere, where that can be."""


@dataclass(frozen=True, slots=True)
class Told:
    """`load`: of a worker, now. `processes`: how many share the port."""

    fleet: Fleet
    load: Callable[[str], Load]
    policy: str
    processes: int = 1
    decisions: Decisions = field(default_factory=Decisions)
    ledger: Ledger = field(default_factory=Ledger)
