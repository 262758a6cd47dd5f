"""The pages of RAM and all that is known of them, as one thing that the rest of the daemon works on. No clock, no I/O.

Always true: a page is in the index as resident exactly while it is in `residency`; when it leaves RAM and a tier below
has it (`Group.below`), the index says so instead.
"""

from collections import Counter, deque
from collections.abc import Callable

from kvd.daemon.departures import Departures
from kvd.daemon.group import NO_PARENT, Group
from kvd.daemon.labels import Labels
from kvd.daemon.leases import Leases
from kvd.daemon.residency import Follower, Residency
from kvd.daemon.sessions import Sessions
from kvd.daemon.space import EVICT_AT_ONCE, Space
from kvd.index import LOWER, IndexWriter
from kvd.pages import NAMESPACE_BYTES
from kvd.storage.arena import Arena
from kvd.storage.quota import Quotas
from kvd.storage.tier import Name, Page
from kvd.storage.worth import Worth, trait
from kvd.wire.stream import NVME, RAM, SHARED

MEDIA = {1: NVME, 2: SHARED}  # what routers call the tiers below, by their bits
_TYPICAL_PAGE_BYTES = 1 << 20  # for the size of what is remembered of pages
_ONE_USE_S = 1.0
_USES_AT_ONCE, _MOST_USES = 512, 1 << 14  # 2 ms, and what may wait


def page_number(namespace: bytes, key: bytes) -> int:
    """What `Worth` knows a page by: 64 bits of its name, which is a hash."""
    return int.from_bytes(namespace[:8]) ^ int.from_bytes(key[:8])


class Stock:
    """`counters` are what `kvdctl status` shows; `on_admit` hears of every page that comes, `on_use` of every use."""

    def __init__(self, arena: Arena, index: IndexWriter, sessions: Sessions, quotas: Quotas) -> None:
        self.arena = arena
        self.index = index
        self.worth = Worth(arena.extents * arena.extent_bytes // _TYPICAL_PAGE_BYTES)
        self.departures = Departures(self.worth, arena.extent_of)
        self.residency = Residency(self.departures)
        self.quotas = quotas
        self.leases = Leases()
        self.labels = Labels()
        self.counters: Counter[str] = Counter()
        self.space = Space(arena, index, self.residency, sessions, self.labels, self.quotas, self.counters)
        self.on_admit: Callable[[Group, float], None] = lambda group, now: None
        self._uses: deque[tuple[int, int, float]] = deque(maxlen=_MOST_USES)
        self.on_use: Callable[[Group, int, float], None] = lambda group, kind, now: None
        self._follower: Follower | None = None

    def follow(self, follower: Follower) -> None:
        """Tell it of all pages in RAM, and from now on of all that come and go. Call it before tiers below tell."""
        self._follower = self.residency.follower = follower
        for group in self.residency:
            follower.came(RAM, group.namespace + group.key, group.parent_key)

    def admit(
        self, namespace: bytes, key: bytes, parent: bytes, slots: tuple[int, ...], length: int, now: float,
        fresh: int = 0, last: bool = False, used: bool = True,
    ) -> Group:  # fmt: skip
        """A whole page becomes resident and visible. The caller has sealed its slots, and checked that it is not.

        `fresh` and `last` as in `worth.trait`. `used`: somebody wants it now.
        """
        size_class = self.arena.slot_bytes(slots[0])
        of = trait(self.depth(namespace, parent), fresh, last)
        number = page_number(namespace, key)
        kind = self._use(number, of, now) if used else self.worth.kind(number, of)
        owner = self.labels.tenant(namespace)
        group = self.residency.admit(namespace, key, parent, slots, length, size_class, owner, kind, now)
        self.quotas.charge(owner, group.bytes)
        group.below = self.below(namespace, key) if self.index.lower else 0
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
            self.departures.pin(group)
            self.space.evict((group.size_class, group.owner), EVICT_AT_ONCE, now)
            self.departures.unpin(group, now)

    def admit_page(self, page: Page, slots: tuple[int, ...], now: float) -> Group:
        """The same for a page whose bytes have come from a tier below: seals its slots."""
        for shard, slot in enumerate(slots):
            self.arena.seal(
                slot, page.length, shard, page.shards, page.namespace, page.key, page.parent, page.checksums[shard]
            )
        return self.admit(page.namespace, page.key, page.parent, slots, page.length, now)

    # -- what pages are worth ------------------------------------------------------------------------------

    def use(self, group: Group, last: bool, now: float) -> None:
        """Somebody read or offered a resident page. All ranks of a worker do, which is one use."""
        if now - group.last_use < _ONE_USE_S:
            return
        group.last_use = now
        kind = self._use(page_number(group.namespace, group.key), trait(group.depth, 0, last), now)
        self.departures.use(group, kind, now)
        self.on_use(group, kind, now)

    def _use(self, number: int, of: int, now: float) -> int:
        """The page's kind. That it was used is learnt in `catch_up`, out of the request's way."""
        self._uses.append((number, of, now))
        return self.worth.kind(number, of)

    def catch_up(self) -> None:
        """Learn of some uses. Where more come than this takes, the oldest are not learnt of."""
        for _ in range(min(len(self._uses), _USES_AT_ONCE)):
            self.worth.use(*self._uses.popleft())

    def seen(self, namespace: bytes, key: bytes) -> bool:
        """Whether the page was used lately, resident or not."""
        return self.worth.seen(page_number(namespace, key))

    def depth(self, namespace: bytes, parent: bytes) -> int:
        """How many pages come before one with this parent, as far as they are resident."""
        group = self.residency.get(namespace, parent) if parent != NO_PARENT else None
        return group.depth + 1 if group is not None else 0

    def belongs(self, namespace: bytes, tenant: str, now: float) -> None:
        """It turned out whose pages these are: after a restart kvd does not know until a worker joins."""
        for group in self.residency:
            if group.namespace == namespace and group.owner != tenant:
                self.quotas.release(group.owner, group.bytes)
                self.departures.hand_over(group, tenant, now)
                self.quotas.charge(tenant, group.bytes)

    # -- what a tier below holds ---------------------------------------------------------------------------

    def below(self, namespace: bytes, key: bytes) -> int:
        """The tiers, by their bits, that hold a page which is not in RAM."""
        place = self.index.place(namespace, key)
        return place ^ LOWER if place is not None and place & LOWER else 0

    def written_below(self, tier: int, group: Group) -> None:
        """A lower tier (its bit) has taken a resident page."""
        group.below |= tier
        if self._follower is not None:
            self._follower.came(MEDIA[tier], group.namespace + group.key, group.parent_key)

    def below_changed(self, tier: int, came: list[Name], left: list[Name]) -> None:
        """Names that a lower tier (its bit) holds now, or holds no more."""
        self.counters["index_full"] += self.index.publish_lower(self._not_in_ram(tier, came), tier)
        for name in left:
            self._left(tier, name[:NAMESPACE_BYTES], name[NAMESPACE_BYTES:])
        if self._follower is not None:
            self._tell(self._follower, MEDIA[tier], came, left)

    def _tell(self, follower: Follower, medium: str, came: list[Name], left: list[Name]) -> None:
        for name in came:
            group = self.residency.get(name[:NAMESPACE_BYTES], name[NAMESPACE_BYTES:])
            follower.came(medium, name, group.parent_key if group is not None else NO_PARENT)
        for name in left:
            follower.left(medium, name)

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
        if self._follower is not None:
            self._follower.forgotten(MEDIA[tier])
        for group in self.residency:
            group.below &= ~tier
