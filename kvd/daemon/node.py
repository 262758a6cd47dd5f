"""The node: what happens to pages. Composes residency, leases, space, the arena and the index; no sockets, no clock.

Each method is one request: it changes memory that the node owns and returns the reply. A page becomes visible
only when every shard of it is committed, and leaves the index before its slots are reused.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from kvd import wire
from kvd.daemon.gate import Prefill
from kvd.daemon.group import Group
from kvd.daemon.hints import Hints, Listener
from kvd.daemon.intake import Intake
from kvd.daemon.pins import Pins
from kvd.daemon.promotion import Lower, Promotion, Source
from kvd.daemon.reading import Reading
from kvd.daemon.recovery import whole_pages
from kvd.daemon.requests import MAX_NAMESPACES, valid_namespace
from kvd.daemon.sessions import Session, Sessions
from kvd.daemon.stock import Stock
from kvd.daemon.writeback import Sink, WriteBack
from kvd.errors import PeerError
from kvd.index import IndexWriter
from kvd.storage.arena import Arena, Header
from kvd.storage.quota import Quotas
from kvd.storage.tier import Name
from kvd.storage.worth import UNKNOWN

EXPIRE_EVERY_S, EXPIRE_AT_ONCE = 10.0, 4096  # pages that outstayed their time to live


class Tier(Source, Sink, Listener, Protocol):
    """A tier below, as far as the node needs it."""


class Node:
    """The RAM tier's decisions. `counters` are what `kvdctl status` shows."""

    def __init__(
        self, arena: Arena, index: IndexWriter, sessions: Sessions, quotas: Quotas | None = None,
        ttl_s: float | None = None, pins_file: Path | None = None,
    ) -> None:  # fmt: skip
        """`ttl_s`: how long a page stays unused. `pins_file`: where pins are remembered. Raises SettingsError."""
        stock = Stock(arena, index, sessions, quotas or Quotas())
        self.pins = Pins(stock, pins_file)
        self.stock = stock
        self.arena = arena
        self.index = index
        self.sessions = sessions
        self.residency = stock.residency
        self.leases = stock.leases
        self.counters = stock.counters
        self.labels = stock.labels
        self.space = stock.space
        self.intake = Intake(stock)
        self.promotion = Promotion(stock)
        self.reading = Reading(stock, self.promotion)
        self.writebacks: list[WriteBack] = []
        self.hints: list[Hints] = []
        stock.on_admit = self._admitted
        stock.on_use = self._used
        self.warm_pages = 0
        self._ttl_s = ttl_s
        self._expire_at = 0.0
        self._lesson: Iterator[None] | None = None

    def add_tier(self, bit: int, below: Tier, write_delay_s: float) -> WriteBack:
        """A tier below, slower than those before."""
        self.promotion.tiers.append(Lower(bit, below))
        self.writebacks.append(WriteBack(self.stock, bit, below, write_delay_s))
        self.hints.append(Hints(self.stock.worth, bit, below, self.pins.names, self.labels.tenants))
        return self.writebacks[-1]

    def _admitted(self, group: Group, now: float) -> None:
        self.pins.admitted(group)
        self._to_be_written(group, now)

    def _to_be_written(self, group: Group, now: float) -> None:
        for writeback in self.writebacks:
            writeback.admitted(group, now)

    def _used(self, group: Group, kind: int, now: float) -> None:
        for hints in self.hints:
            hints.used(group, kind)
        self._to_be_written(group, now)  # what was not worth writing may be now

    def pin(self, chain: Sequence[Group]) -> bool:
        """These pages stay, in RAM and on this node's disk; False: they did before. Raises Refused."""
        fresh = self.pins.pin(chain)
        for hints in self.hints:
            hints.pinned(group.namespace + group.key for group in chain)
        return fresh

    def unpin(self, tip: Name, now: float) -> int:
        """End a pin; how many pages it was the last to keep. Raises Refused."""
        free = self.pins.unpin(tip, now)
        for hints in self.hints:
            hints.unpinned(dict.fromkeys(free, UNKNOWN))
        return len(free)

    # -- registration --------------------------------------------------------------------------------------

    def join(self, session: Session, specs: list[wire.NamespaceSpec], now: float) -> list[int]:
        """Ids of the namespaces, in order. Raises PeerError or Refused."""
        ids: list[int] = []
        for spec in specs:
            valid_namespace(spec, self.arena.extent_bytes)
            if not spec.tenant:  # `kvdctl import`, say: who does not say whose pages these are changes nothing
                spec = msgspec.structs.replace(spec, tenant=self.labels.tenant(spec.digest))
            if spec not in session.namespaces:
                if len(session.namespaces) >= MAX_NAMESPACES:
                    raise PeerError(f"{session} joins more than {MAX_NAMESPACES} namespaces")
                session.namespaces.append(spec)
            if spec.tenant != self.labels.tenant(spec.digest):
                self.stock.belongs(spec.digest, spec.tenant, now)
                for hints in self.hints:
                    hints.belongs(spec.digest, spec.tenant)
            self.labels.add(spec)
            ids.append(session.namespaces.index(spec))
        return ids

    def report(self, session: Session, circuit: str, counters: dict[str, int]) -> None:
        """What a worker's plugin saw since it started."""
        session.circuit, session.counters = circuit, counters
        for spec in session.namespaces:
            self.labels.measured(spec.digest, Prefill.of(counters))

    # -- time and death ------------------------------------------------------------------------------------

    def bury(self, session: Session) -> None:
        """The session's connection is gone: free all it held."""
        self.intake.take_back(self.leases.bury(session.id))
        self.promotion.bury(session.id)
        self.sessions.remove(session)

    def tick(self, now: float) -> None:
        """Expire what is overdue."""
        overdue = self.leases.expire(now)
        self.counters["reservations_expired"] += len(overdue)
        self.intake.take_back(overdue)
        self.promotion.tick(now)
        for hints in self.hints:  # first: a tier that starts anew must know of pins before it makes room
            hints.tick()
        for writeback in self.writebacks:
            writeback.tick(now)
        self.intake.expire(now)
        if self._ttl_s is not None and now >= self._expire_at:
            self._expire_at = now + min(EXPIRE_EVERY_S, self._ttl_s / 4)
            self.counters["ram_expired"] += self.space.expire(now - self._ttl_s, now, EXPIRE_AT_ONCE)
        self.stock.catch_up()
        if self._lesson is None and self.stock.worth.due:
            self._lesson = self.stock.worth.lesson(now)
        if self._lesson is not None and next(self._lesson, self) is self:  # a step a tick: nobody waits for it
            self._lesson = None

    # -- the arena of a previous daemon --------------------------------------------------------------------

    def recover(self, found: Iterable[tuple[int, Header]], now: float) -> None:
        """Admit every whole page among the sealed slots, parents before children; free the rest."""
        pages, spare = whole_pages(found)
        for header, slots in pages:
            self.stock.admit(header.namespace, header.key, header.parent, slots, header.length, now, used=False)
        for slot in spare:
            self.arena.give(slot)
        self.warm_pages = len(self.residency)

    def check(self, cursor: int, count: int) -> tuple[list[str], int]:
        """Broken invariants of `count` page ids from `cursor` on, in words, and where to go on: -1 at the end.

        In parts because a large node has millions of pages, and who checks it must not hold up the workers.
        """
        following = max(cursor, 0) + count
        if max(cursor, 0) <= self.residency.last_id:
            return self.residency.faults(max(cursor, 0), following), following
        owned = {slot for group in self.residency for slot in group.slots}
        owned |= self.intake.slots() | self.promotion.slots()
        found = self.leases.faults() + self.arena.faults(owned)
        if len(self.index) - self.index.lower != len(self.residency):
            found.append(f"index shows {len(self.index) - self.index.lower} pages, {len(self.residency)} are resident")
        return found, -1

    def faults(self) -> list[str]:
        """All broken invariants of everything the node owns."""
        found: list[str] = []
        cursor = 0
        while cursor >= 0:
            some, cursor = self.check(cursor, 1 << 20)
            found += some
        return found
