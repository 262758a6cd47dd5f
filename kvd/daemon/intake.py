"""Pages on their way in from workers: reserved, written by the worker, committed; visible once all shards are here.

Always true: a slot that was handed out comes back exactly once: committed, given up, or taken back when time is up or
its worker is dead. Pure: time is a number.
"""

from kvd import wire
from kvd.daemon.group import NO_PARENT
from kvd.daemon.leases import Reservation, Write
from kvd.daemon.partials import Partials
from kvd.daemon.requests import bounded, joined, keys_of, valid_ttl
from kvd.daemon.sessions import Session
from kvd.daemon.stock import Stock
from kvd.errors import PeerError
from kvd.pages import KEY_BYTES
from kvd.storage.arena import slot_bytes_for


class Intake:
    """Requests of writers, and what became of them."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._arena = stock.arena
        self._residency = stock.residency
        self._leases = stock.leases
        self._space = stock.space
        self._counters = stock.counters
        self._admit = stock.admit
        self._partials = Partials()
        self._writing: set[tuple[bytes, int]] = set()  # namespace + key, shard

    def reserve(self, session: Session, request: wire.ReservePages, now: float) -> wire.Reserved:
        """Places for what is new; pages that are held, or being written by someone else, are skipped."""
        spec = joined(session, request.ns)
        ttl_s = valid_ttl(request.ttl_s)
        bounded(session, self._leases.held_by(session.id))
        keys = keys_of(request.keys)
        if len(request.parent) not in (0, KEY_BYTES):
            raise PeerError("a parent key has 32 bytes")
        parent = request.parent or NO_PARENT
        line = slot_bytes_for(spec.page_bytes), spec.tenant
        fresh = sum(not self._stock.seen(spec.digest, key) for key in keys)
        rows: list[bytes] = []
        writes: dict[int, Write] = {}
        full = False
        for position, key in enumerate(keys):
            last = position == len(keys) - 1
            verdict, slot = wire.WRITE, None
            if self._skip(spec, key, last, now):
                verdict = wire.HELD
            elif not full:
                slot = self._space.take(line, now, len(keys) - position)
                full = slot is None
            if slot is None:
                rows.append(wire.RESERVED_ROW.pack(0, 0, wire.NO_ROOM if verdict == wire.WRITE else verdict))
                self._counters["writes_dropped"] += verdict == wire.WRITE
            else:
                offset, generation = self._arena.offset(slot), self._arena.generation(slot)
                self._writing.add((spec.digest + key, spec.shard))
                writes[offset] = Write(slot, generation, key, parent, fresh, last)
                rows.append(wire.RESERVED_ROW.pack(offset, generation, wire.WRITE))
            parent = key if request.chained else NO_PARENT
        reservation = 0
        if writes:
            reservation = self._leases.reserve(
                session.id, spec.digest, spec.shard, spec.shards, spec.page_bytes, writes, now, ttl_s
            ).id
        return wire.Reserved(request.request, reservation, b"".join(rows))

    def _skip(self, spec: wire.NamespaceSpec, key: bytes, last: bool, now: float) -> bool:
        name = spec.digest + key
        group = self._residency.get(spec.digest, key)
        if group is not None:
            self._stock.use(group, last, now)
            return True
        return (name, spec.shard) in self._writing or self._partials.has(spec.digest, key, spec.shard)

    def commit(self, session: Session, request: wire.CommitPages, now: float) -> wire.Committed | None:
        """Pages become visible once all their shards are committed. The last commit gives up what is left."""
        reservation = self._leases.reservation(request.reservation, session.id)
        if reservation is None:
            self._counters["late_commits"] += 1
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
        self._leases.close(reservation)
        self.take_back([reservation])
        return wire.Committed(request.request, reservation.committed)

    def _commit_one(self, reservation: Reservation, write: Write, checksum: bytes, now: float) -> None:
        slot, key, parent = write.slot, write.key, write.parent
        self._writing.discard((reservation.namespace + key, reservation.shard))
        if self._residency.get(reservation.namespace, key) is not None:
            self._arena.give(slot)
            return
        self._arena.seal(
            slot, reservation.length, reservation.shard, reservation.shards, reservation.namespace, key, parent,
            checksum,
        )  # fmt: skip
        self._add_shard(reservation, write, now)
        reservation.committed += 1
        self._counters["pages_written"] += 1

    def _add_shard(self, reservation: Reservation, write: Write, now: float) -> None:
        namespace, shards, length = reservation.namespace, reservation.shards, reservation.length
        slot, key, parent = write.slot, write.key, write.parent
        if shards == 1:
            self._admit(namespace, key, parent, (slot,), length, now, write.fresh, write.last)
            return
        partial = self._partials.add(namespace, key, parent, reservation.shard, shards, length, slot, now)
        if partial is None:
            self._arena.give(slot)  # ranks disagree: the namespace should have kept them apart
            self._counters["shard_conflicts"] += 1
        elif partial.whole:
            self._admit(namespace, key, partial.parent, partial.in_order, length, now, write.fresh, write.last)

    def take_back(self, reservations: list[Reservation]) -> None:
        """Free the slots of ended reservations that were not committed."""
        for reservation in reservations:
            for write in reservation.writes.values():
                self._writing.discard((reservation.namespace + write.key, reservation.shard))
                self._arena.give(write.slot)

    def expire(self, now: float) -> None:
        """Give up pages whose other shards do not come."""
        for partial in self._partials.expire(now):
            self._counters["partial_pages_expired"] += 1
            for slot in partial.slots.values():
                self._arena.give(slot)

    def slots(self) -> set[int]:
        """What is reserved, or committed and not whole yet."""
        return self._partials.slots() | self._leases.reserved_slots()
