"""Leases and reservations: who may read or write which pages, and until when. Pure: time is a number.

A *lease* lets a worker read pages: they are not evicted meanwhile. A *reservation* gives a worker slots to
write: nobody sees them until they are committed. Both end by their owner's word, by time, or with its death.

Always true: every lease and reservation has a living owner, and its end is reported exactly once.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from kvd.daemon.residency import Group


@dataclass(frozen=True, slots=True)
class Lease:
    id: int
    owner: int  # session
    groups: tuple[Group, ...]
    expires_at: float


class Write(NamedTuple):
    """One page that may be written, and its place in a chain."""

    slot: int
    generation: int
    key: bytes
    parent: bytes


@dataclass(slots=True)
class Reservation:
    """`writes` are the pages to come, by their offset in the arena; `committed` counts those that came."""

    id: int
    owner: int
    namespace: bytes
    shard: int
    shards: int
    length: int
    expires_at: float
    writes: dict[int, Write]
    committed: int = 0


@dataclass(slots=True)
class Leases:
    """All that is outstanding."""

    _leases: dict[int, Lease] = field(default_factory=dict)
    _reservations: dict[int, Reservation] = field(default_factory=dict)
    _last_id: int = 0
    _held_by: Counter[int] = field(default_factory=Counter)  # leases and reservations of each owner

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def grant(self, owner: int, groups: tuple[Group, ...], now: float, ttl_s: float) -> Lease:
        lease = Lease(self._new_id(), owner, groups, now + ttl_s)
        self._leases[lease.id] = lease
        self._held_by[owner] += 1
        for group in groups:
            group.leases += 1
        return lease

    def release(self, lease_id: int, owner: int) -> Lease | None:
        """End a lease; None when it is gone already or belongs to somebody else."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.owner != owner:
            return None
        del self._leases[lease_id]
        self._held_by[owner] -= 1
        for group in lease.groups:
            group.leases -= 1
        return lease

    def reserve(
        self, owner: int, namespace: bytes, shard: int, shards: int, length: int,
        writes: dict[int, Write], now: float, ttl_s: float,
    ) -> Reservation:  # fmt: skip
        made = Reservation(self._new_id(), owner, namespace, shard, shards, length, now + ttl_s, writes)
        self._reservations[made.id] = made
        self._held_by[owner] += 1
        return made

    def reservation(self, reservation_id: int, owner: int) -> Reservation | None:
        """None when it ended already or belongs to somebody else."""
        found = self._reservations.get(reservation_id)
        return found if found is not None and found.owner == owner else None

    def close(self, reservation: Reservation) -> None:
        """End a reservation that is live."""
        self._end(reservation)

    def _end(self, reservation: Reservation) -> Reservation:
        self._held_by[reservation.owner] -= 1
        return self._reservations.pop(reservation.id)

    def held_by(self, owner: int) -> int:
        """How many leases and reservations a session has."""
        return self._held_by[owner]

    def expire(self, now: float) -> list[Reservation]:
        """End what is overdue; the reservations among it, so that their slots can be taken back."""
        for lease in [lease for lease in self._leases.values() if lease.expires_at <= now]:
            self.release(lease.id, lease.owner)
        overdue = [r for r in self._reservations.values() if r.expires_at <= now]
        return [self._end(r) for r in overdue]

    def bury(self, owner: int) -> list[Reservation]:
        """The owner is dead: end all it had; its reservations, so that their slots can be taken back."""
        for lease in [lease for lease in self._leases.values() if lease.owner == owner]:
            self.release(lease.id, owner)
        mine = [r for r in self._reservations.values() if r.owner == owner]
        ended = [self._end(r) for r in mine]
        del self._held_by[owner]
        return ended

    def counts(self, owner: int) -> tuple[int, int]:
        """(leases, reservations) of one session."""
        return (
            sum(lease.owner == owner for lease in self._leases.values()),
            sum(r.owner == owner for r in self._reservations.values()),
        )

    def reserved_slots(self) -> set[int]:
        return {write.slot for r in self._reservations.values() for write in r.writes.values()}

    def faults(self) -> list[str]:
        """Broken invariants, in words."""
        held: dict[int, int] = {}
        for lease in self._leases.values():
            for group in lease.groups:
                held[id(group)] = held.get(id(group), 0) + 1
        return [
            f"group {group.id} counts {group.leases} leases, {held[id(group)]} are live"
            for lease in self._leases.values()
            for group in lease.groups
            if group.leases != held[id(group)]
        ]
