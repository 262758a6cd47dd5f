"""Room for pages: free slots, and what has to leave for them. Changes the memory it is handed; no clock.

Always true: a page is out of the index before the lease tables are read, and those before its slots are reused.
"""

from collections import Counter
from math import inf

from kvd.daemon.departures import Line
from kvd.daemon.group import Group, children
from kvd.daemon.labels import Labels
from kvd.daemon.residency import Residency
from kvd.daemon.sessions import Sessions
from kvd.index import LOWER, IndexWriter
from kvd.storage.arena import Arena
from kvd.storage.quota import Quotas, loser

DRAIN_AT_ONCE = 256
EVICT_AT_ONCE = 32  # reading the lease tables is the dear part: share it


class Space:
    """Takes slots and makes room for them."""

    def __init__(
        self, arena: Arena, index: IndexWriter, residency: Residency, sessions: Sessions, labels: Labels,
        quotas: Quotas, counters: Counter[str],
    ) -> None:  # fmt: skip
        self._arena = arena
        self._index = index
        self._residency = residency
        self._departures = residency.departures
        self._quotas = quotas
        self._sessions = sessions
        self._labels = labels
        self._counters = counters
        self._draining: int | None = None  # an extent that is being emptied for another class
        self._drained = 0  # positions of it that were looked at

    def take(self, line: Line, now: float, want: int) -> int | None:
        """A slot for a page of this size class and tenant, the first of `want`; None when nothing can leave for it."""
        slot = self._arena.take(line[0])
        if slot is None and self._make_room(line, now, want):
            slot = self._arena.take(line[0])
        return slot

    def evict(self, line: Line, want: int, now: float) -> int:
        """Evict up to `want` pages of a size class so that a tenant's pages fit; how many left."""
        return self._remove_unheld(self._victims(line, want, now), now)

    def _victims(self, line: Line, want: int, now: float) -> list[Group]:
        size_class, asker = line
        offers = {owner: density for (size, owner), density in self._departures.offers().items() if size == size_class}
        chosen: list[Group] = []
        lost: Counter[str] = Counter()
        while len(chosen) < want:
            owner = loser(self._quotas, asker, want * size_class, size_class, offers, lost)
            if owner is None:
                break
            group = self._departures.victim((size_class, owner), now)
            if group is None:
                del offers[owner]
                continue
            chosen.append(group)
            lost[owner] += group.bytes
            if len(offers) > 1:
                offers[owner] = self._departures.lowest((size_class, owner))
        return chosen

    def drop(self, group: Group, now: float) -> None:
        """Forget an idle leaf at once."""
        self._index.withdraw(group.namespace, group.key)
        self._forget(group, now)

    def quarantine(self, group: Group, part: str, now: float) -> None:
        """A page is not what was stored: never serve it again, keep its descendants as chains of their own."""
        if self._residency.by_place(group.place) is not group:
            return
        self._counters[f"corrupt_{part}"] += 1
        self._index.withdraw(group.namespace, group.key)
        for other in self._residency.disown(group, now):
            self._index.withdraw(other.namespace, other.key)
            self._publish(other)
        self._forget(group, now, quarantined=True)

    def expire(self, before: float, now: float, most: int) -> int:
        """Evict up to `most` pages that nobody has used since `before`, each before its parent; how many left."""
        overdue = [group for group in self._residency if group.last_use < before and not group.held]
        victims: list[Group] = []
        for group in sorted(overdue, key=lambda group: -group.depth):
            if len(victims) < most and all(child.leaving for child in children(group)):
                group.leaving = True
                self._departures.withdraw(group)
                victims.append(group)
        return self._remove_unheld(victims, now)

    def _make_room(self, line: Line, now: float, want: int) -> bool:
        """Evict from the class, or take an extent from a class whose next page is worth less than half as much."""
        size_class = line[0]
        idle = self._arena.idle_extent(size_class)
        if idle is not None:
            self._arena.release_extent(idle)
            self._draining = None if idle == self._draining else self._draining
            return True
        if self._draining is not None and self._departures.keeps(self._draining):  # pinned since
            self._arena.open_extent(self._draining)
            self._draining = None
        if self._draining is None:
            worth = self._least_worth(now)
            own, first = worth.pop(size_class, (inf, None))
            least, other = min(worth.values(), key=lambda found: found[0], default=(inf, None))
            # Draining takes good pages along: the other's must be idle for twice as long, too.
            if other is not None and 2 * least < own and (first is None or _idle_twice_as_long(other, first, now)):
                self._begin_to_drain(other)
        if self._draining is not None and self._drain(self._draining, now):
            return True
        return self.evict(line, min(max(want, 1), EVICT_AT_ONCE), now) > 0

    def _least_worth(self, now: float) -> dict[int, tuple[float, Group]]:
        """Of each size class the page that leaves next, and the seconds of prefill a byte of it saves per second."""
        found: dict[int, tuple[float, Group]] = {}
        for line in self._departures.offers():
            group = self._departures.peek(line, now)
            if group is not None:
                worth = self._departures.density(group, now) * self._labels.saved_s_per_byte(group.namespace)
                if group.size_class not in found or worth < found[group.size_class][0]:
                    found[group.size_class] = worth, group
        return found

    def _begin_to_drain(self, first: Group) -> None:
        """Close the extent that holds a class's next candidate, or another of its class where a pin keeps that one."""
        own = self._arena.extent_of(first.slots[0])
        able = [e for e in self._arena.extents_of(first.size_class) if not self._departures.keeps(e)]
        if able:
            self._draining, self._drained = own if own in able else min(able, key=self._arena.in_use), 0
            self._arena.close_extent(self._draining)

    def _drain(self, extent: int, now: float) -> bool:
        """Empty a part of a closed extent: a whole one of small pages would stall everybody. True when it is empty."""
        headers = self._arena.committed(extent, self._drained, DRAIN_AT_ONCE)
        inside = [self._residency.get(header.namespace, header.key) for header in headers]
        victims = self._residency.with_descendants([group for group in inside if group is not None and not group.held])
        victims = [group for group in victims if not group.held]
        if len(victims) <= DRAIN_AT_ONCE:
            self._drained += DRAIN_AT_ONCE
        victims = victims[:DRAIN_AT_ONCE]  # long conversations hang below: the deepest first, the rest next time
        for group in victims:
            group.leaving = True
            self._departures.withdraw(group)
        self._remove_unheld(victims, now)
        if self._drained >= self._arena.slots(extent):
            self._drained = 0  # what was in use the first time may not be any more
        if self._arena.in_use(extent):
            return False
        self._arena.release_extent(extent)
        self._draining = None
        return True

    def _remove_unheld(self, victims: list[Group], now: float) -> int:
        for group in victims:
            self._index.withdraw(group.namespace, group.key)
        held = self._sessions.held_places(now) if victims else set()
        removed = 0
        for group in victims:
            if group.place in held or not group.is_leaf:
                self._departures.spare(group, now)
                self._publish(group)
                continue
            self._forget(group, now)
            removed += 1
            for sibling in self._idle_side_pages(group):
                self.drop(sibling, now)
        self._counters["ram_evicted"] += removed
        return removed

    def _idle_side_pages(self, group: Group) -> list[Group]:
        """Pages of the same model's side pools that are of no use without this one."""
        found = (self._residency.get(digest, group.key) for digest in self._labels.side_pools(group.namespace))
        return [page for page in found if page is not None and not page.held and page.is_leaf]

    def _publish(self, group: Group) -> None:
        self._index.publish(group.namespace, group.key, group.place, group.depth)

    def _forget(self, group: Group, now: float, quarantined: bool = False) -> None:
        self._residency.remove(group, now)
        self._quotas.release(group.owner, group.bytes)
        if group.below:
            self._index.publish(group.namespace, group.key, LOWER | group.below, 0)
        for slot in group.slots:
            self._arena.give(slot, quarantined=quarantined)


def _idle_twice_as_long(other: Group, own: Group, now: float) -> bool:
    return now - other.last_use > 2 * (now - own.last_use)
