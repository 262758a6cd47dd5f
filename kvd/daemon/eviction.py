"""Pages that leave RAM because an operator says so: one and all that follow it, a namespace, everything. Pure.

In parts, because a large node has millions of pages and its workers must not wait for an operator. Whoever asks goes
over all page ids, and over them again until a round finds nothing to evict: what a worker stored meanwhile goes too.

Always true: a page leaves after those that follow it; what is read, promised or pinned stays, and what comes before
it stays too. As in `space`, a page is out of the index before the lease tables are read.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from kvd import wire
from kvd.daemon.group import NO_PARENT, Group
from kvd.daemon.sessions import Sessions
from kvd.daemon.stock import Stock
from kvd.errors import PeerError
from kvd.pages import KEY_BYTES, NAMESPACE_BYTES
from kvd.storage.tier import Name

AT_ONCE: Final = 1024  # ids looked at, and pages evicted, in one part: some 10 ms of the loop


class Selection(NamedTuple):
    """What an operator names. An empty namespace is every one, an empty key every page."""

    namespace: bytes
    key: bytes

    @classmethod
    def of(cls, request: wire.EvictPages | wire.RemoveBelow) -> "Selection":
        """Raises PeerError for what names nothing, and for everything unless it says so."""
        if len(request.namespace) not in (0, NAMESPACE_BYTES) or len(request.key) not in (0, KEY_BYTES):
            raise PeerError("malformed eviction")
        if request.everything == bool(request.namespace or request.key) or request.key == NO_PARENT:
            raise PeerError("an eviction names pages, or says everything")
        return cls(request.namespace, request.key)

    def begins_at(self, group: Group) -> bool:
        """Is it the first of a chain's pages that are meant? The others hang below it."""
        if self.namespace and group.namespace != self.namespace:
            return False
        return group.key == self.key or (group.parent is None and self.key in (b"", group.parent_key))


def evict_part(stock: Stock, sessions: Sessions, which: Selection, cursor: int, now: float) -> wire.Evicted:
    """Evict what is meant among the next ids. `held` is complete once a whole round evicted nothing."""
    held = sessions.held_places(now)
    victims: list[Group] = []
    kept, at = 0, cursor
    while at <= stock.residency.last_id and at < cursor + AT_ONCE:
        group = stock.residency.by_id(at)
        if group is not None and which.begins_at(group):
            below, stays = _subtree(group, held, AT_ONCE - len(victims))
            victims += below
            kept += stays
            if len(victims) == AT_ONCE:
                break  # the same id again: more may hang there
        at += 1
    evicted, spared = _remove(stock, sessions, victims, now)
    return wire.Evicted(evicted, kept + spared, at if at <= stock.residency.last_id else -1)


def evict_names(stock: Stock, sessions: Sessions, names: Iterable[Name], now: float) -> None:
    """Evict those of these pages that are in RAM, as far as nothing follows them and nobody holds them."""
    groups = (stock.residency.get(name[:NAMESPACE_BYTES], name[NAMESPACE_BYTES:]) for name in names)
    found = [group for group in groups if group is not None and not group.held]
    _remove(stock, sessions, sorted(found, key=lambda group: -group.depth), now)


def _subtree(top: Group, held: set[int], most: int) -> tuple[list[Group], int]:
    """Up to `most` pages that may leave, each before its parent; and how many were met that may not."""
    may: list[Group] = []
    stays = 0
    path: list[tuple[Group, Group | None]] = [(top, top.first_child)]  # and the next child to look at
    blocked: set[int] = set()  # ids of pages that come before one that stays
    while path and len(may) < most:
        group, child = path.pop()
        if child is not None:
            path += [(group, child.next), (child, child.first_child)]
        elif group.held or group.place in held or group.id in blocked:
            stays += 1
            if group is not top and group.parent is not None:
                blocked.add(group.parent.id)
        else:
            may.append(group)
    return may, stays


def _remove(stock: Stock, sessions: Sessions, victims: list[Group], now: float) -> tuple[int, int]:
    """(removed, spared). With a page of a model's main pool go those of its side pools: they are of no use alone."""
    for group in victims:
        stock.index.withdraw(group.namespace, group.key)
    held = sessions.held_places(now) if victims else set()
    removed = spared = 0
    for group in victims:
        if stock.residency.by_place(group.place) is not group:
            continue  # a side page, gone with its main page
        if group.place in held or not group.is_leaf:
            stock.index.publish(group.namespace, group.key, group.place, group.depth)
            spared += 1
            continue
        stock.space.drop(group, now)
        removed += 1
        for digest in stock.labels.side_pools(group.namespace):
            side = stock.residency.get(digest, group.key)
            if side is not None and side.is_leaf and not side.held and side.place not in held:
                stock.space.drop(side, now)
                removed += 1
    stock.counters["pages_evicted_by_operators"] += removed
    return removed, spared
