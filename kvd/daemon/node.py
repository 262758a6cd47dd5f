"""The node: what happens to pages. Composes residency, leases, space, the arena and the index; no sockets, no clock.

Each method is one request: it changes memory that the node owns and returns the reply. A page becomes visible
only when every shard of it is committed, and leaves the index before its slots are reused.
"""

from collections import Counter
from collections.abc import Iterable

from kvd import wire
from kvd.daemon.labels import Labels
from kvd.daemon.leases import Leases, Reservation, Write
from kvd.daemon.partials import Partials
from kvd.daemon.recovery import whole_pages
from kvd.daemon.requests import joined, keys_of, valid_namespace, valid_ttl
from kvd.daemon.residency import NO_PARENT, Group, Residency
from kvd.daemon.sessions import Session, Sessions
from kvd.daemon.space import EVICT_AT_ONCE, Space
from kvd.errors import PeerError
from kvd.index import IndexWriter
from kvd.pages import KEY_BYTES
from kvd.storage.arena import Arena, Header, slot_bytes_for

MAX_NAMESPACES = 256  # of one session
MAX_HELD = 512  # leases and reservations of one session; an honest one has as many as it has threads


class Node:
    """The RAM tier's decisions. `counters` are what `kvdctl status` shows."""

    def __init__(self, arena: Arena, index: IndexWriter, sessions: Sessions) -> None:
        self.arena = arena
        self.index = index
        self.sessions = sessions
        self.residency = Residency()
        self.leases = Leases()
        self.counters: Counter[str] = Counter()
        self.warm_pages = 0
        self.labels = Labels()
        self._partials = Partials()
        self.space = Space(arena, index, self.residency, sessions, self.labels, self.counters)
        self._writing: set[tuple[bytes, int]] = set()  # namespace + key, shard

    # -- registration --------------------------------------------------------------------------------------

    def join(self, session: Session, specs: list[wire.NamespaceSpec]) -> list[int]:
        """Ids of the namespaces, in order. Raises PeerError or Refused."""
        ids: list[int] = []
        for spec in specs:
            valid_namespace(spec, self.arena.extent_bytes)
            if spec not in session.namespaces:
                if len(session.namespaces) >= MAX_NAMESPACES:
                    raise PeerError(f"{session} joins more than {MAX_NAMESPACES} namespaces")
                session.namespaces.append(spec)
            self.labels.add(spec)
            ids.append(session.namespaces.index(spec))
        return ids

    def _bounded(self, session: Session) -> None:
        if self.leases.held_by(session.id) >= MAX_HELD:
            raise PeerError(f"{session} holds {MAX_HELD} leases and reservations, and asks for more")

    # -- reading -------------------------------------------------------------------------------------------

    def lookup(self, session: Session, request: wire.Lookup, now: float) -> wire.Found:
        """How many leading pages are resident; they are leased for `ttl_s`."""
        spec = joined(session, request.ns)
        found: list[Group] = []
        for key in keys_of(request.keys):
            group = self.residency.get(spec.digest, key)
            if group is None:
                break
            found.append(group)
        ttl_s = valid_ttl(request.ttl_s)
        if found and self.leases.held_by(session.id) >= MAX_HELD:
            self.counters["lookups_without_lease"] += 1
            found = []  # what cannot be promised is a miss
        if found:
            self.leases.grant(session.id, tuple(found), now, ttl_s)
        return wire.Found(request.request, len(found))

    def lease(self, session: Session, request: wire.LeasePages, now: float) -> wire.Leased:
        """Places to read; a row of length 0 for each page that is absent or damaged."""
        spec = joined(session, request.ns)
        ttl_s = valid_ttl(request.ttl_s)
        self._bounded(session)
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
                self.space.quarantine(group, "header")
                rows.append(wire.LEASED_ROW.pack(0, 0, 0, b""))
                continue
            self.residency.touch(group, now)
            groups.append(group)
            rows.append(
                wire.LEASED_ROW.pack(self.arena.offset(slot), header.generation, header.length, header.checksum)
            )
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

    def release(self, session: Session, lease_id: int, bad: list[int]) -> None:
        """End a lease. Pages a reader found damaged are quarantined, unless someone else has begun to use them."""
        lease = self.leases.release(lease_id, session.id)
        if lease is None:
            self.counters["late_releases"] += 1
            return
        for position in bad:
            if 0 <= position < len(lease.groups):
                self.space.quarantine(lease.groups[position], "payload")

    # -- writing -------------------------------------------------------------------------------------------

    def reserve(self, session: Session, request: wire.ReservePages, now: float) -> wire.Reserved:
        """Places for what is new; pages that are held, or being written by someone else, are skipped."""
        spec = joined(session, request.ns)
        ttl_s = valid_ttl(request.ttl_s)
        self._bounded(session)
        keys = keys_of(request.keys)
        if len(request.parent) not in (0, KEY_BYTES):
            raise PeerError("a parent key has 32 bytes")
        parent = request.parent or NO_PARENT
        size_class = slot_bytes_for(spec.page_bytes)
        rows: list[bytes] = []
        writes: dict[int, Write] = {}
        full = False
        for key in keys:
            verdict, slot = wire.WRITE, None
            if self._skip(spec, key, now):
                verdict = wire.HELD
            elif not full:
                slot = self.space.take(size_class, now, len(keys) - len(rows))
                full = slot is None
            if slot is None:
                rows.append(wire.RESERVED_ROW.pack(0, 0, wire.NO_ROOM if verdict == wire.WRITE else verdict))
                self.counters["writes_dropped"] += verdict == wire.WRITE
            else:
                offset, generation = self.arena.offset(slot), self.arena.generation(slot)
                self._writing.add((spec.digest + key, spec.shard))
                writes[offset] = Write(slot, generation, key, parent)
                rows.append(wire.RESERVED_ROW.pack(offset, generation, wire.WRITE))
            parent = key if request.chained else NO_PARENT
        reservation = 0
        if writes:
            reservation = self.leases.reserve(
                session.id, spec.digest, spec.shard, spec.shards, spec.page_bytes, writes, now, ttl_s
            ).id
        return wire.Reserved(request.request, reservation, b"".join(rows))

    def _skip(self, spec: wire.NamespaceSpec, key: bytes, now: float) -> bool:
        name = spec.digest + key
        group = self.residency.get(spec.digest, key)
        if group is not None:
            self.residency.touch(group, now)
            return True
        return (name, spec.shard) in self._writing or self._partials.has(spec.digest, key, spec.shard)

    def commit(self, session: Session, request: wire.CommitPages, now: float) -> wire.Committed | None:
        """Pages become visible once all their shards are committed. The last commit gives up what is left."""
        reservation = self.leases.reservation(request.reservation, session.id)
        if reservation is None:
            self.counters["late_commits"] += 1
            return None if request.more else wire.Committed(request.request, 0)
        if len(request.rows) % wire.COMMIT_ROW.size:
            raise PeerError("malformed commit")
        for offset, generation, checksum in wire.COMMIT_ROW.iter_unpack(request.rows):
            write = reservation.writes.get(offset)
            if write is not None and write.generation == generation:
                del reservation.writes[offset]
                self._commit_one(reservation, write, checksum, now)
        if request.more:
            return None
        self.leases.close(reservation)
        self.take_back([reservation])
        return wire.Committed(request.request, reservation.committed)

    def _commit_one(self, reservation: Reservation, write: Write, checksum: bytes, now: float) -> None:
        slot, _, key, parent = write
        self._writing.discard((reservation.namespace + key, reservation.shard))
        if self.residency.get(reservation.namespace, key) is not None:
            self.arena.give(slot)
            return
        self.arena.seal(
            slot, reservation.length, reservation.shard, reservation.shards, reservation.namespace, key, parent,
            checksum,
        )  # fmt: skip
        self._add_shard(reservation, slot, key, parent, now)
        reservation.committed += 1
        self.counters["pages_written"] += 1

    def _add_shard(self, reservation: Reservation, slot: int, key: bytes, parent: bytes, now: float) -> None:
        namespace, shards, length = reservation.namespace, reservation.shards, reservation.length
        if shards == 1:
            self._admit(namespace, key, parent, (slot,), length, now)
            return
        partial = self._partials.add(namespace, key, parent, reservation.shard, shards, length, slot, now)
        if partial is None:
            self.arena.give(slot)  # ranks disagree: the namespace should have kept them apart
            self.counters["shard_conflicts"] += 1
        elif partial.whole:
            self._admit(namespace, key, partial.parent, partial.in_order, length, now)

    def _admit(
        self, namespace: bytes, key: bytes, parent: bytes, slots: tuple[int, ...], length: int, now: float
    ) -> None:
        size_class = self.arena.slot_bytes(slots[0])
        group = self.residency.admit(namespace, key, parent, slots, length, size_class, now)
        if not self.index.publish(namespace, key, group.place, group.depth):
            self.space.evict(size_class, EVICT_AT_ONCE, now)
            if not self.index.publish(namespace, key, group.place, group.depth):
                self.counters["index_full"] += 1

    # -- time and death ------------------------------------------------------------------------------------

    def take_back(self, reservations: list[Reservation]) -> None:
        """Free the slots of ended reservations that were not committed."""
        for reservation in reservations:
            for write in reservation.writes.values():
                self._writing.discard((reservation.namespace + write.key, reservation.shard))
                self.arena.give(write.slot)

    def bury(self, session: Session) -> None:
        """The session's connection is gone: free all it held."""
        self.take_back(self.leases.bury(session.id))
        self.sessions.remove(session)

    def tick(self, now: float) -> None:
        """Expire what is overdue."""
        overdue = self.leases.expire(now)
        self.counters["reservations_expired"] += len(overdue)
        self.take_back(overdue)
        for partial in self._partials.expire(now):
            self.counters["partial_pages_expired"] += 1
            for slot in partial.slots.values():
                self.arena.give(slot)

    # -- the arena of a previous daemon --------------------------------------------------------------------

    def recover(self, found: Iterable[tuple[int, Header]], now: float) -> None:
        """Admit every whole page among the sealed slots, parents before children; free the rest."""
        pages, spare = whole_pages(found)
        for header, slots in pages:
            self._admit(header.namespace, header.key, header.parent, slots, header.length, now)
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
        owned |= self._partials.slots() | self.leases.reserved_slots()
        found = self.leases.faults() + self.arena.faults(owned)
        if len(self.index) != len(self.residency):
            found.append(f"index holds {len(self.index)} pages, {len(self.residency)} are resident")
        return found, -1

    def faults(self) -> list[str]:
        """All broken invariants of everything the node owns."""
        found: list[str] = []
        cursor = 0
        while cursor >= 0:
            some, cursor = self.check(cursor, 1 << 20)
            found += some
        return found
