"""Requests of readers: what is held, what is worth fetching from below, where pages lie, what was damaged.

Always true: what a lookup reported is promised until the read or the deadline; a page is fetched only where the gate
says that loading takes less time than computing.

Pure: time is a number.
"""

from kvd import wire
from kvd.daemon.decisions import Decisions
from kvd.daemon.gate import Prefill, decide
from kvd.daemon.group import Group
from kvd.daemon.promotion import Promotion
from kvd.daemon.requests import bounded, joined, keys_of, valid_prefix, valid_ttl, valid_wait
from kvd.daemon.sessions import Session
from kvd.daemon.stock import Stock
from kvd.storage.arena import Header


class Reading:
    """`decisions`: what the gate decided lately."""

    def __init__(self, stock: Stock, promotion: Promotion) -> None:
        self.decisions = Decisions()
        self._promotion = promotion
        self._stock = stock
        self._arena = stock.arena
        self._index = stock.index
        self._residency = stock.residency
        self._leases = stock.leases
        self._counters = stock.counters
        self._space = stock.space
        self._labels = stock.labels

    def lookup(self, session: Session, request: wire.Lookup, now: float) -> wire.Found:
        """How many leading pages are held; promised for `ttl_s`; what is not in RAM is fetched meanwhile."""
        spec = joined(session, request.ns)
        keys, ttl_s = keys_of(request.keys), valid_ttl(request.ttl_s)
        valid_wait(request.wait_s)
        valid_prefix(request.before, request.parent)
        groups: list[Group | None] = []  # None: not in RAM
        for key in keys:
            group = self._residency.get(spec.digest, key)
            if group is None and self._index.place(spec.digest, key) is None:
                break
            groups.append(group)
        found = tuple(group for group in groups if group is not None)
        self._leases.promise(session.id, found, now + ttl_s)  # before a fetch makes room
        pages = self._worth(session, spec, request, keys, groups, now)
        for position, group in enumerate(groups[:pages]):
            if group is None and not self._promotion.fetch(session.id, spec, keys[position], now + ttl_s, now):
                pages = position
                break
        self._promotion.send()
        return wire.Found(request.request, pages)

    def _worth(
        self, session: Session, spec: wire.NamespaceSpec, request: wire.Lookup, keys: list[bytes],
        groups: list[Group | None], now: float,
    ) -> int:  # fmt: skip
        """How many leading pages to give, when those that are not in RAM (None) have to be fetched first."""
        places: dict[int, list[int]] = {}  # positions, by the bit of the tier that has them
        for position, group in enumerate(groups):
            if group is None:
                lower = self._promotion.where(spec.digest, keys[position])
                if lower is None and not self._promotion.on_the_way(spec.digest, [keys[position]]):
                    groups = groups[:position]
                    break
                if lower is not None:
                    places.setdefault(lower.bit, []).append(position)
        pages = len(groups)
        prefill = Prefill.of(session.counters)
        if not prefill.known:  # it has just started: what computing cost others of its kind
            prefill = self._labels.prefill(spec.digest)
        for lower in self._promotion.tiers:
            below = places.get(lower.bit, [])
            if not below:
                continue
            own = self._promotion.own(session.id, lower, spec.digest, request.parent)
            tokens = (request.before + below[0]) * spec.page_tokens
            decision = decide(
                lower.disk, len(below), spec.page_bytes * spec.shards, spec.page_tokens, prefill, now,
                tokens, own, request.wait_s,
            )  # fmt: skip
            self.decisions.add(now, session, spec.pool, lower.bit, decision)
            self._counters[f"gate_{decision.reason.replace(' ', '_')}"] += 1
            for position in below[: decision.probe]:
                self._promotion.fetch(session.id, spec, keys[position], now, now)
            if decision.pages < len(below):
                self._counters["gate_refused_pages"] += len(below) - decision.pages
                pages = min(pages, below[decision.pages])
        return pages

    def on_the_way(self, session: Session, request: wire.LeasePages, now: float) -> set[bytes]:
        """Names of the pages that a reader wants and that are coming from below; begins to fetch them."""
        valid_wait(request.wait_s)
        if self._index.lower == len(self._promotion) == 0:
            return set()
        spec = joined(session, request.ns)
        keys, until = keys_of(request.keys), now + valid_ttl(request.ttl_s)
        for key in keys:
            if self._residency.get(spec.digest, key) is None:
                self._promotion.fetch(session.id, spec, key, until, now)
        self._promotion.send()
        return self._promotion.on_the_way(spec.digest, keys)

    def lease(self, session: Session, request: wire.LeasePages, now: float) -> wire.Leased:
        """Places to read; a row of length 0 for each page that is absent or damaged."""
        spec = joined(session, request.ns)
        ttl_s = valid_ttl(request.ttl_s)
        bounded(session, self._leases.held_by(session.id))
        rows: list[bytes] = []
        groups: list[Group] = []
        for key in keys_of(request.keys):
            group = self._residency.get(spec.digest, key)
            slot = group.slots[spec.shard] if group is not None and spec.shard < len(group.slots) else None
            if group is None or slot is None:
                rows.append(wire.LEASED_ROW.pack(0, 0, 0, b""))
                continue
            header = self._arena.header(slot)
            if not self._matches(group, slot, header):
                self._space.quarantine(group, "header", now)
                rows.append(wire.LEASED_ROW.pack(0, 0, 0, b""))
                continue
            groups.append(group)
            rows.append(
                wire.LEASED_ROW.pack(self._arena.offset(slot), header.generation, header.length, header.checksum)
            )
        for group in groups:
            self._stock.use(group, group is groups[-1], now)
        self._counters["ram_hits"] += len(groups)
        self._counters["ram_misses"] += len(rows) - len(groups)
        lease = self._leases.grant(session.id, tuple(groups), now, ttl_s).id if groups else 0
        return wire.Leased(request.request, lease, b"".join(rows))

    def _matches(self, group: Group, slot: int, header: Header) -> bool:
        return (
            header.key == group.key
            and header.namespace == group.namespace
            and header.length == group.length
            and self._arena.intact(slot, header)
        )

    def release(self, session: Session, lease_id: int, bad: list[int], now: float) -> None:
        """End a lease. Pages a reader found damaged are quarantined, unless someone else has begun to use them."""
        lease = self._leases.release(lease_id, session.id)
        if lease is None:
            self._counters["late_releases"] += 1
            return
        self._leases.keep_promises(session.id, lease.groups)
        for position in bad:
            if 0 <= position < len(lease.groups):
                self._space.quarantine(lease.groups[position], "payload", now)
