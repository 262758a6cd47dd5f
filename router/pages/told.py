"""What a router has to tell of itself: who knows it. The interface between the pages and the parts they show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvd.errors import Refused
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


@dataclass(frozen=True, slots=True)
class Configured:
    """A worker of whom no more is known than that it was configured."""

    name: str
    state: str = "serving"
    model: str = ""
    node: str = ""
    credit: bool = False
    why: str = "this router goes by load alone"
    remedy: str = ""
    health: str = ""
    parity: str = "unknown"
    origin: str = "configured"


class ConfiguredFleet:
    """The workers of the settings, for as long as the router runs."""

    def __init__(self, workers: Mapping[str, object]) -> None:
        self._members = [Configured(name) for name in workers]

    def members(self) -> Sequence[Member]:
        return self._members

    def add(self, url: str) -> object:
        raise self._fixed()

    def drain(self, name: str) -> object:
        raise self._fixed()

    def remove(self, name: str) -> object:
        raise self._fixed()

    @staticmethod
    def _fixed() -> Refused:
        return Refused("this router's workers are fixed", "change `workers` in its settings and restart it")
