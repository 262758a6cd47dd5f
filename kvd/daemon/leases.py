"""Leases and reservations: who may read or write which pages, and until when. Pure: time is a number.

A *lease* lets a worker read pages: they are not evicted meanwhile. A *promise* is what a lookup gives, for the read
that is to follow: it ends with that read. A *reservation* gives a worker slots to write: nobody sees them until they
are committed. All end by their owner's word, by time, or with its death.

Always true: every lease and reservation has a living owner, and its end is reported exactly once.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvd.daemon.group import Group


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
    fresh: int  # how many pages of its request had never been seen
    last: bool  # it ended the request


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
class Promise:
    """How many lookups of one session wait to read a page, and until when."""

    group: Group
    reads: int
    until: float


@dataclass(slots=True)
class Leases:
    """All that is outstanding."""

    _leases: dict[int, Lease] = field(default_factory=dict)
    _reservations: dict[int, Reservation] = field(default_factory=dict)
    _promises: dict[int, dict[int, Promise]] = field(default_factory=dict)  # owner -> place -> promise
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

    def promise(self, owner: int, groups: Iterable[Group], until: float) -> None:
        """Hold pages for a read that is to follow."""
        for group in groups:
            mine = self._promises.setdefault(owner, {})
            held = mine.get(group.place)
            if held is None:
                mine[group.place] = Promise(group, 1, until)
                group.leases += 1
            else:
                held.reads += 1
                held.until = max(held.until, until)

    def keep_promises(self, owner: int, groups: Iterable[Group]) -> None:
        """The read has happened."""
        mine = self._promises.get(owner)
        for group in groups if mine else ():
            held = mine.get(group.place)  # type: ignore[union-attr]
            if held is not None:
                held.reads -= 1
                if not held.reads:
                    self._end_promise(owner, held)

    def _end_promise(self, owner: int, promise: Promise) -> None:
        mine = self._promises[owner]
        del mine[promise.group.place]
        promise.group.leases -= 1
        if not mine:
            del self._promises[owner]

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
        for owner, mine in list(self._promises.items()):
            for promise in [promise for promise in mine.values() if promise.until <= now]:
                self._end_promise(owner, promise)
        overdue = [r for r in self._reservations.values() if r.expires_at <= now]
        return [self._end(r) for r in overdue]

    def bury(self, owner: int) -> list[Reservation]:
        """The owner is dead: end all it had; its reservations, so that their slots can be taken back."""
        for lease in [lease for lease in self._leases.values() if lease.owner == owner]:
            self.release(lease.id, owner)
        for promise in list(self._promises.get(owner, {}).values()):
            self._end_promise(owner, promise)
        mine = [r for r in self._reservations.values() if r.owner == owner]
        ended = [self._end(r) for r in mine]
        del self._held_by[owner]
        return ended

    def counts(self, owner: int) -> tuple[int, int]:
        """(leases, reservations) of one session."""
        return (
            sum(lease.owner == owner for lease in self._leases.values()) + len(self._promises.get(owner, ())),
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
        promises = [promise for mine in self._promises.values() for promise in mine.values()]
        for promise in promises:
            held[id(promise.group)] = held.get(id(promise.group), 0) + 1
        groups = [group for lease in self._leases.values() for group in lease.groups]
        return [
            f"group {group.id} counts {group.leases} leases, {held[id(group)]} are live"
            for group in [*groups, *(promise.group for promise in promises)]
            if group.leases != held[id(group)]
        ]
