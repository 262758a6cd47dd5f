"""Who is a member: the orders of operators and the announcements of nodes, carried out.

Whoever joins is watched from then on; steering and the doors are told. What an operator drained or removed does not
come back because a node announces it, by whatever URL, only by `add`. At most MOST_WORKERS, whatever nodes announce.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from kvd.errors import Refused
from kvd.router.fleet.crew import Crew, Doors
from kvd.router.fleet.linking import Link
from kvd.router.fleet.members import GONE_AFTER_S, Origin, State, state_of
from kvd.router.fleet.watch import Watch
from kvd.router.rates import Rates
from kvd.router.steering import Worker, worker_at

log = logging.getLogger("kvd.router")

MOST_WORKERS: Final = 1024
NO_LINK: Final = Link(None, "it has not said what it is")
DRAINS: Final = Link(None, "it drains")  # and takes nothing from one that is the same server and stays


@dataclass(slots=True, eq=False)
class Entry:
    """A worker that is watched. `admitted`: it is a member; one that was announced is asked first who it is.

    `link`: as of the last look at everything.
    """

    worker: Worker
    origin: Origin
    watch: Watch
    admitted: bool
    draining: bool = False
    rates: Rates = field(default_factory=Rates)
    link: Link = NO_LINK

    @property
    def name(self) -> str:
        return self.worker.name

    @property
    def life(self) -> str:
        return self.watch.told.life if self.watch.told is not None else ""

    @property
    def state(self) -> State:
        return state_of(self.draining, self.watch.asked, not self.watch.health.why)


class Membership:
    """`watched`: starts to watch a worker; `unwatched`: ends it. Nothing is told before `attach`."""

    def __init__(self, watched: Callable[[Worker], Watch], unwatched: Callable[[Entry], None]) -> None:
        self._entries: dict[str, Entry] = {}
        self._watched = watched
        self._unwatched = unwatched
        self._steering: Crew | None = None
        self._doors: Doors | None = None
        self._sent_away: set[str] = set()  # URLs
        self._sent_lives: dict[str, None] = {}  # the oldest first: nodes may tell of them under other URLs, or again

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def attach(self, steering: Crew, doors: Doors) -> None:
        """Members of now are known to them already."""
        self._steering, self._doors = steering, doors

    def find(self, name: str) -> Entry | None:
        """The member of this name."""
        entry = self._entries.get(name)
        return entry if entry is not None and entry.admitted else None

    def running(self, entry: Entry) -> int:
        """Requests that it has of this process."""
        return self._steering.running(entry.name) if self._steering is not None else 0

    # Orders

    def configured(self, worker: Worker) -> None:
        """One of the settings: a member from the start, and well until it shows that it is not."""
        self._enter(worker, "configured", admitted=True)

    def add(self, url: str) -> str:
        """A worker joins, or drains no more; its name. Raises Refused."""
        try:
            worker = worker_at(url)
        except ValueError as error:
            raise Refused(str(error), "for instance http://127.0.0.1:30000") from error
        entry = self._entries.get(worker.name)
        if entry is None:
            if len(self._entries) >= MOST_WORKERS:
                self._make_room()
            entry = self._enter(worker, "added", admitted=False)
        self._sent_away.discard(worker.name)
        self._sent_lives.pop(entry.life, None)  # one that is not known yet: when it is
        entry.origin, entry.draining = "added", False
        self._admit(entry)
        return worker.name

    def drain(self, name: str) -> None:
        """It gets nothing new, and leaves when it has nothing left. Raises Refused."""
        entry = self._known(name)
        self._drain(entry)
        self._send_away(entry)

    def remove(self, name: str) -> None:
        """It leaves at once; what it is answering goes on elsewhere where it can. Raises Refused."""
        entry = self._known(name)
        self._leave(entry, "an operator removed it")
        self._send_away(entry)

    # What follows from what is known

    def announced(self, lives: Mapping[str, str], sure: bool, now: float) -> None:
        """What the nodes tell of: lives by URLs. `sure`: that they tell of all that they have.

        Nobody is a member twice: one whose life is a member's already is that member, by another name.
        """
        known = {entry.life for entry in self}
        for entry in self:
            if entry.origin != "announced" and not entry.draining:  # `add` came before its life was known
                self._sent_lives.pop(entry.life, None)
        for url, life in lives.items():
            if life in self._sent_lives:
                self._sent_away.add(url)
            new = url not in self._entries and url not in self._sent_away and (not life or life not in known)
            if new and len(self._entries) < MOST_WORKERS:
                self._enter(worker_at(url), "announced", admitted=False)
        first = {entry.life: entry for entry in self if entry.origin != "announced"}
        if sure:
            self._sent_away &= lives.keys()
        settled = all(entry.state != "joining" for entry in self if entry.admitted)
        for entry in self:
            if entry.origin != "announced":
                continue
            if sure and entry.name not in lives and now - entry.watch.heard_at > GONE_AFTER_S:
                self._leave(entry, "its node has dropped it, and it does not answer")
            elif entry.life in self._sent_lives:  # its node did not tell which life it is
                self._sent_away.add(entry.name)
                self._drain(entry)
            elif entry.life and first.setdefault(entry.life, entry) is not entry:
                self._drain(entry)
            elif not entry.admitted and settled and entry.watch.told is not None:
                self._admit(entry)

    def go_on(self) -> None:
        """Steering hears who is well; who has drained leaves."""
        if self._steering is None:
            return
        for entry in self:
            if entry.admitted:
                silent = entry.origin == "added" and entry.watch.heard_at < 0.0  # it may not be there yet
                self._steering.well(entry.name, not entry.watch.health.why and not silent)
            if entry.draining and not self._steering.running(entry.name):
                self._leave(entry, "it has drained")

    # Inside

    def _send_away(self, entry: Entry) -> None:
        self._sent_away.add(entry.name)
        if entry.life:
            self._sent_lives[entry.life] = None
            if len(self._sent_lives) > MOST_WORKERS:
                del self._sent_lives[next(iter(self._sent_lives))]

    def _make_room(self) -> None:
        """For one of an operator's, who cannot see or remove those that are no members yet. Raises Refused."""
        stranger = next((entry for entry in self if not entry.admitted), None)
        if stranger is None:
            raise Refused(f"there are {MOST_WORKERS} workers", "remove some, or start another router")
        self._leave(stranger, "an operator's takes its place")

    def _known(self, name: str) -> Entry:
        entry = self.find(name)
        if entry is None:
            with suppress(ValueError):
                entry = self.find(worker_at(name).name)  # it may be written otherwise
        if entry is None:
            known = ", ".join(entry.name for entry in self if entry.admitted)
            raise Refused(f"there is no worker {name}", f"known are {known or 'none'}")
        return entry

    def _enter(self, worker: Worker, origin: Origin, admitted: bool) -> Entry:
        entry = self._entries[worker.name] = Entry(worker, origin, self._watched(worker), admitted)
        return entry

    def _admit(self, entry: Entry) -> None:
        if self._doors is not None and self._steering is not None:
            self._doors.join(entry.worker)
            self._steering.join(entry.worker, entry.watch.heard_at >= 0.0)
        if not entry.admitted:
            log.info("%s joins: %s", entry.name, entry.origin)
        entry.admitted = True

    def _drain(self, entry: Entry) -> None:
        entry.draining = True
        if self._steering is not None:
            self._steering.drain(entry.name)

    def _leave(self, entry: Entry, why: str) -> None:
        del self._entries[entry.name]
        self._unwatched(entry)
        if entry.admitted and self._steering is not None and self._doors is not None:
            self._steering.leave(entry.name)
            self._doors.leave(entry.name)
            log.info("%s leaves: %s", entry.name, why)
