"""The node: what happens to pages. Composes residency, leases, space, the arena and the index; no sockets, no clock.

Each method is one request: it changes memory that the node owns and returns the reply. A page becomes visible
only when every shard of it is committed, and leaves the index before its slots are reused.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from kvd import wire
from kvd.daemon.decisions import Decisions
from kvd.daemon.gate import Prefill, decide
from kvd.daemon.group import Group
from kvd.daemon.hints import Hints, Listener
from kvd.daemon.intake import Intake
from kvd.daemon.pins import Pins
from kvd.daemon.promotion import Lower, Promotion, Source
from kvd.daemon.recovery import whole_pages
from kvd.daemon.requests import bounded, joined, keys_of, valid_namespace, valid_prefix, valid_ttl, valid_wait
from kvd.daemon.sessions import Session, Sessions
from kvd.daemon.stock import Stock
from kvd.daemon.writeback import Sink, WriteBack
from kvd.errors import PeerError
from kvd.index import IndexWriter
from kvd.storage.arena import Arena, Header
from kvd.storage.quota import Quotas
from kvd.storage.tier import Name
from kvd.storage.worth import UNKNOWN

MAX_NAMESPACES = 256  # of one session
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
        self.writebacks: list[WriteBack] = []
        self.hints: list[Hints] = []
        self.decisions = Decisions()
        self._prefill: dict[bytes, Prefill] = {}  # by namespace, the last known
        stock.on_admit = self._admitted
        stock.on_use = self._used
        self.warm_pages = 0
        self._ttl_s = ttl_s
        self._expire_at = 0.0
        self._lesson: Iterator[None] | None = None

    def add_tier(self, bit: int, below: Tier, write_delay_s: float) -> WriteBack:
        """A tier below, slower than those before."""
        self.stock.passes_on = True
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

    def pin(self, chain: Sequence[Group]) -> None:
        """These pages stay, in RAM and on this node's disk. Raises Refused."""
        self.pins.pin(chain)
        for hints in self.hints:
            hints.pinned(group.namespace + group.key for group in chain)

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

    # -- reading -------------------------------------------------------------------------------------------

    def lookup(self, session: Session, request: wire.Lookup, now: float) -> wire.Found:
        """How many leading pages are held; promised for `ttl_s`; what is not in RAM is fetched meanwhile."""
        spec = joined(session, request.ns)
        keys, ttl_s = keys_of(request.keys), valid_ttl(request.ttl_s)
        valid_wait(request.wait_s)
        valid_prefix(request.before, request.parent)
        groups: list[Group | None] = []  # None: not in RAM
        for key in keys:
            group = self.residency.get(spec.digest, key)
            if group is None and self.index.place(spec.digest, key) is None:
                break
            groups.append(group)
        found = tuple(group for group in groups if group is not None)
        self.leases.promise(session.id, found, now + ttl_s)  # before a fetch makes room
        pages = self._worth(session, spec, request, keys, groups, now)
        for position, group in enumerate(groups[:pages]):
            if group is None and not self.promotion.fetch(session.id, spec, keys[position], now + ttl_s, now):
                pages = position
                break
        self.promotion.send()
        return wire.Found(request.request, pages)

    def _worth(
        self, session: Session, spec: wire.NamespaceSpec, request: wire.Lookup, keys: list[bytes],
        groups: list[Group | None], now: float,
    ) -> int:  # fmt: skip
        """How many leading pages to give, when those that are not in RAM (None) have to be fetched first."""
        places: dict[int, list[int]] = {}  # positions, by the bit of the tier that has them
        for position, group in enumerate(groups):
            if group is None:
                lower = self.promotion.where(spec.digest, keys[position])
                if lower is None and not self.promotion.on_the_way(spec.digest, [keys[position]]):
                    groups = groups[:position]
                    break
                if lower is not None:
                    places.setdefault(lower.bit, []).append(position)
        pages = len(groups)
        prefill = self._prefill_of(session, spec)
        for lower in self.promotion.tiers:
            below = places.get(lower.bit, [])
            if not below:
                continue
            own = self.promotion.own(session.id, lower, spec.digest, request.parent)
            tokens = (request.before + below[0]) * spec.page_tokens
            decision = decide(
                lower.disk, len(below), spec.page_bytes * spec.shards, spec.page_tokens, prefill, now,
                tokens, own, request.wait_s,
            )  # fmt: skip
            self.decisions.add(now, session, spec.pool, lower.bit, decision)
            self.counters[f"gate_{decision.reason.replace(' ', '_')}"] += 1
            for position in below[: decision.probe]:
                self.promotion.fetch(session.id, spec, keys[position], now, now)
            if decision.pages < len(below):
                self.counters["gate_refused_pages"] += len(below) - decision.pages
                pages = min(pages, below[decision.pages])
        return pages

    def _prefill_of(self, session: Session, spec: wire.NamespaceSpec) -> Prefill:
        """What computing costs a worker; of one that has just started, what it cost others of its kind."""
        prefill = Prefill.of(session.counters)
        if not prefill.known:
            return self._prefill.get(spec.digest, prefill)
        self._prefill[spec.digest] = prefill
        if len(self._prefill) > MAX_NAMESPACES:
            del self._prefill[next(iter(self._prefill))]
        return prefill

    def on_the_way(self, session: Session, request: wire.LeasePages, now: float) -> set[bytes]:
        """Names of the pages that a reader wants and that are coming from below; begins to fetch them."""
        valid_wait(request.wait_s)
        if self.index.lower == len(self.promotion) == 0:
            return set()
        spec = joined(session, request.ns)
        keys, until = keys_of(request.keys), now + valid_ttl(request.ttl_s)
        for key in keys:
            if self.residency.get(spec.digest, key) is None:
                self.promotion.fetch(session.id, spec, key, until, now)
        self.promotion.send()
        return self.promotion.on_the_way(spec.digest, keys)

    def lease(self, session: Session, request: wire.LeasePages, now: float) -> wire.Leased:
        """Places to read; a row of length 0 for each page that is absent or damaged."""
        spec = joined(session, request.ns)
        ttl_s = valid_ttl(request.ttl_s)
        bounded(session, self.leases.held_by(session.id))
        rows: list[bytes] = []
        groups: list[Group] = []
        for key in keys_of(request.keys):
            group = self.residency.get(spec.digest, key)
            slot = group.slots[spec.shard] if group is not None and spec.shard < len(group.slots) else None
            if group is None or slot is None:
                rows.append(wire.LEASED_ROW.pack(0, 0, 0, b""))
                continue
            header = self.arena.header(slot)
            if not self._matches(group, slot, header):
                self.space.quarantine(group, "header", now)
                rows.append(wire.LEASED_ROW.pack(0, 0, 0, b""))
                continue
            groups.append(group)
            rows.append(
                wire.LEASED_ROW.pack(self.arena.offset(slot), header.generation, header.length, header.checksum)
            )
        for group in groups:
            self.stock.use(group, group is groups[-1], now)
        self.counters["ram_hits"] += len(groups)
        self.counters["ram_misses"] += len(rows) - len(groups)
        lease = self.leases.grant(session.id, tuple(groups), now, ttl_s).id if groups else 0
        return wire.Leased(request.request, lease, b"".join(rows))

    def _matches(self, group: Group, slot: int, header: Header) -> bool:
        return (
            header.key == group.key
            and header.namespace == group.namespace
            and header.length == group.length
            and self.arena.intact(slot, header)
        )

    def release(self, session: Session, lease_id: int, bad: list[int], now: float) -> None:
        """End a lease. Pages a reader found damaged are quarantined, unless someone else has begun to use them."""
        lease = self.leases.release(lease_id, session.id)
        if lease is None:
            self.counters["late_releases"] += 1
            return
        self.leases.keep_promises(session.id, lease.groups)
        for position in bad:
            if 0 <= position < len(lease.groups):
                self.space.quarantine(lease.groups[position], "payload", now)

    # -- time and death ------------------------------------------------------------------------------------

    def bury(self, session: Session) -> None:
        """The session's connection is gone: free all it held."""
        self.intake.take_back(self.leases.bury(session.id))
        self.sessions.remove(session)

    def tick(self, now: float) -> None:
        """Expire what is overdue."""
        overdue = self.leases.expire(now)
        self.counters["reservations_expired"] += len(overdue)
        self.intake.take_back(overdue)
        self.promotion.tick(now)
        for writeback in self.writebacks:
            writeback.tick(now)
        self.intake.expire(now)
        if self._ttl_s is not None and now >= self._expire_at:
            self._expire_at = now + min(EXPIRE_EVERY_S, self._ttl_s / 4)
            self.counters["ram_expired"] += self.space.expire(now - self._ttl_s, now, EXPIRE_AT_ONCE)
        if self._lesson is None and self.stock.worth.due:
            self._lesson = self.stock.worth.lesson(now)
        if self._lesson is not None and next(self._lesson, self) is self:  # a step a tick: nobody waits for it
            self._lesson = None
        for hints in self.hints:
            hints.tick()

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
