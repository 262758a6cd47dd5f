"""Room for pages: free slots, and what has to leave for them. Changes the memory it is handed; no clock.

Always true: a page is out of the index before the lease tables are read, and those before its slots are reused.
"""

from collections import Counter

from kvd.daemon.labels import Labels
from kvd.daemon.residency import Group, Residency
from kvd.daemon.sessions import Sessions
from kvd.index import LOWER, IndexWriter
from kvd.storage.arena import Arena

DRAIN_AT_ONCE = 256
EVICT_AT_ONCE = 32  # reading the lease tables is the dear part: share it


class Space:
    """Takes slots and makes room for them."""

    def __init__(
        self, arena: Arena, index: IndexWriter, residency: Residency, sessions: Sessions, labels: Labels,
        counters: Counter[str],
    ) -> None:  # fmt: skip
        self._arena = arena
        self._index = index
        self._residency = residency
        self._sessions = sessions
        self._labels = labels
        self._counters = counters
        self._draining: int | None = None  # an extent that is being emptied for another class
        self._drained = 0  # positions of it that were looked at

    def take(self, size_class: int, now: float, want: int) -> int | None:
        """A slot, for the first of `want` pages; None when nothing can leave."""
        slot = self._arena.take(size_class)
        if slot is None and self._make_room(size_class, now, want):
            slot = self._arena.take(size_class)
        return slot

    def evict(self, size_class: int, want: int, now: float) -> int:
        """Evict up to `want` pages of a class; how many left."""
        return self._remove_unheld(self._residency.victims(size_class, want), now)

    def drop(self, group: Group) -> None:
        """Forget an idle leaf at once."""
        self._index.withdraw(group.namespace, group.key)
        self._forget(group)

    def quarantine(self, group: Group, part: str) -> None:
        """A page is not what was stored: never serve it again, keep its descendants as chains of their own."""
        if self._residency.by_place(group.place) is not group:
            return
        self._counters[f"corrupt_{part}"] += 1
        self._index.withdraw(group.namespace, group.key)
        for other in self._residency.disown(group):
            self._index.withdraw(other.namespace, other.key)
            self._publish(other)
        self._forget(group, quarantined=True)

    def _make_room(self, size_class: int, now: float, want: int) -> bool:
        """Evict from the class, or take an extent from a class whose oldest page is idle for twice as long."""
        idle = self._arena.idle_extent(size_class)
        if idle is not None:
            self._arena.release_extent(idle)
            self._draining = None if idle == self._draining else self._draining
            return True
        own = self._residency.oldest_use(size_class)
        others = [
            (oldest, other)
            for other in self._residency.size_classes()
            if other != size_class and (oldest := self._residency.oldest_use(other)) is not None
        ]
        if self._draining is None and others:
            oldest, other = min(others)
            if own is None or now - oldest > 2 * (now - own):
                self._begin_to_drain(other)
        if self._draining is not None and self._drain(self._draining, now):
            return True
        return self.evict(size_class, min(max(want, 1), EVICT_AT_ONCE), now) > 0

    def _begin_to_drain(self, size_class: int) -> None:
        """Close the extent that holds a class's next candidate."""
        first = self._residency.candidate(size_class)
        if first is not None:
            self._draining, self._drained = self._arena.extent_of(first.slots[0]), 0
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
                self._residency.spare(group, now)
                self._publish(group)
                continue
            self._forget(group)
            removed += 1
            for sibling in self._idle_side_pages(group):
                self.drop(sibling)
        self._counters["ram_evicted"] += removed
        return removed

    def _idle_side_pages(self, group: Group) -> list[Group]:
        """Pages of the same model's side pools that are of no use without this one."""
        found = (self._residency.get(digest, group.key) for digest in self._labels.side_pools(group.namespace))
        return [page for page in found if page is not None and not page.held and page.is_leaf]

    def _publish(self, group: Group) -> None:
        self._index.publish(group.namespace, group.key, group.place, group.depth)

    def _forget(self, group: Group, quarantined: bool = False) -> None:
        self._residency.remove(group)
        if group.below:
            self._index.publish(group.namespace, group.key, LOWER | group.below, 0)
        for slot in group.slots:
            self._arena.give(slot, quarantined=quarantined)
