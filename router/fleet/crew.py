"""Whom the fleet tells of workers that come and go. The interfaces.

Told in this order: doors before steering when a worker joins, steering before doors when it leaves. So nobody is sent
where no door is. Calls neither block nor raise.
"""

from typing import Protocol

from kvd.router.load import Report
from kvd.router.steering import Worker


class Crew(Protocol):
    """Chooses among workers: kvd.router.leastbusy."""

    def join(self, worker: Worker, well: bool) -> None:
        """It may be chosen from now on. One that is there already drains no more."""

    def well(self, name: str, well: bool) -> None:
        """Whether it answers as it should; one that does not gets nothing while others are there."""

    def drain(self, name: str) -> None:
        """It gets nothing new, and finishes what it has."""

    def leave(self, name: str) -> None:
        """It is forgotten."""

    def running(self, name: str) -> int:
        """How many requests it has of us."""


class Doors(Protocol):
    """Keeps connections to workers: kvd.router.proxy.house."""

    def join(self, worker: Worker) -> None: ...
    def leave(self, name: str) -> None:
        """What is still running there is cut, and goes on elsewhere where it can."""


class Reported(Protocol):
    """Hears what engines say of their load: kvd.router.activeload.ActiveLoad.reported."""

    def __call__(self, worker: str, report: Report) -> None: ...
