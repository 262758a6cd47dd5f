"""The pages of RAM and all that is known of them, as one thing that the rest of the daemon works on. No clock, no I/O.

Always true: a page is in the index as resident exactly while it is in `residency`; when it leaves RAM and a tier below
has it (`Group.below`), the index says so instead.
"""

from collections import Counter
from collections.abc import Callable

from kvd.daemon.labels import Labels
from kvd.daemon.leases import Leases
from kvd.daemon.residency import Group, Residency
from kvd.daemon.sessions import Sessions
from kvd.daemon.space import EVICT_AT_ONCE, Space
from kvd.index import LOWER, IndexWriter
from kvd.pages import NAMESPACE_BYTES
from kvd.storage.arena import Arena
from kvd.storage.tier import Name, Page


class Stock:
    """`counters` are what `kvdctl status` shows; `on_admit` is told of every page that becomes resident."""

    def __init__(self, arena: Arena, index: IndexWriter, sessions: Sessions) -> None:
        self.arena = arena
        self.index = index
        self.residency = Residency()
        self.leases = Leases()
        self.labels = Labels()
        self.counters: Counter[str] = Counter()
        self.space = Space(arena, index, self.residency, sessions, self.labels, self.counters)
        self.on_admit: Callable[[Group, float], None] = lambda group, now: None

    def admit(
        self, namespace: bytes, key: bytes, parent: bytes, slots: tuple[int, ...], length: int, now: float
    ) -> Group:
        """A whole page becomes resident and visible. The caller has sealed its slots, and checked that it is not."""
        size_class = self.arena.slot_bytes(slots[0])
        group = self.residency.admit(namespace, key, parent, slots, length, size_class, now)
        group.below = self.below(namespace, key)
        if not self.index.publish(namespace, key, group.place, group.depth):
            self._make_room_in_index(group, now)
            if not self.index.publish(namespace, key, group.place, group.depth):
                self.counters["index_full"] += 1
        self.on_admit(group, now)
        return group

    def _make_room_in_index(self, group: Group, now: float) -> None:
        """RAM comes first: names of pages below it go, and only then pages of RAM, but not the one that just came."""
        dropped = self.index.make_room(EVICT_AT_ONCE)
        self.counters["names_below_dropped"] += dropped
        if not dropped:
            group.leaving = True
            self.space.evict(group.size_class, EVICT_AT_ONCE, now)
            group.leaving = False

    def admit_page(self, page: Page, slots: tuple[int, ...], now: float) -> Group:
        """The same for a page whose bytes have come from a tier below: seals its slots."""
        for shard, slot in enumerate(slots):
            self.arena.seal(
                slot, page.length, shard, page.shards, page.namespace, page.key, page.parent, page.checksums[shard]
            )
        return self.admit(page.namespace, page.key, page.parent, slots, page.length, now)

    # -- what a tier below holds ---------------------------------------------------------------------------

    def below(self, namespace: bytes, key: bytes) -> int:
        """The tiers, by their bits, that hold a page which is not in RAM."""
        place = self.index.place(namespace, key)
        return place ^ LOWER if place is not None and place & LOWER else 0

    def below_changed(self, tier: int, came: list[Name], left: list[Name]) -> None:
        """Names that a lower tier (its bit) holds now, or holds no more."""
        self.counters["index_full"] += self.index.publish_lower(self._not_in_ram(tier, came), tier)
        for name in left:
            self._left(tier, name[:NAMESPACE_BYTES], name[NAMESPACE_BYTES:])

    def _not_in_ram(self, tier: int, came: list[Name]) -> list[Name]:
        """Those of the names; the other pages are told that the tier has them."""
        if not len(self.residency):  # a start from nothing, with millions of names
            return came
        absent: list[Name] = []
        for name in came:
            group = self.residency.get(name[:NAMESPACE_BYTES], name[NAMESPACE_BYTES:])
            if group is None:
                absent.append(name)
            else:
                group.below |= tier
        return absent

    def _left(self, tier: int, namespace: bytes, key: bytes) -> None:
        group = self.residency.get(namespace, key)
        if group is not None:
            group.below &= ~tier
        elif tiers := self.below(namespace, key) & ~tier:
            self.index.publish(namespace, key, LOWER | tiers, 0)
        else:
            self.index.withdraw(namespace, key)

    def below_lacks(self, tier: int, namespace: bytes, key: bytes) -> None:
        """A lower tier was asked for a page and does not have it."""
        self.below_changed(tier, [], [namespace + key])

    def below_forgotten(self, tier: int) -> None:
        """What a lower tier holds is unknown until it says so again."""
        self.index.withdraw_lower(tier)
        for group in self.residency:
            group.below &= ~tier
