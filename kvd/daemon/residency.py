"""Which pages are resident, and how they hang together. Pure: time is a number.

The unit is the page *group*: one page of one namespace with all its shards. Groups form chains by their parent's key.
Eviction takes leaves only; which one is for `departures` to say.

Always true: an ancestor that a group counts in its `depth` stays resident as long as the group does.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from kvd.daemon.departures import Departures
from kvd.daemon.group import NO_PARENT, Group, children, hang, unhang
from kvd.wire.stream import RAM


class Follower(Protocol):
    """Whoever must know of every page that a tier gets or loses. Names are namespace + key. Called within requests."""

    def came(self, medium: str, name: bytes, parent: bytes = ...) -> None: ...
    def left(self, medium: str, name: bytes) -> None: ...
    def forgotten(self, medium: str) -> None: ...


@dataclass(slots=True)
class Residency:
    """All resident groups."""

    departures: Departures
    follower: Follower | None = None
    _groups: dict[bytes, Group] = field(default_factory=dict)  # namespace + key
    _ids: list[Group | None] = field(default_factory=lambda: [None])  # id 0 is never used
    _free_ids: list[int] = field(default_factory=list)
    _generation: int = 0

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def get(self, namespace: bytes, key: bytes) -> Group | None:
        return self._groups.get(namespace + key)

    def by_id(self, group_id: int) -> Group | None:
        return self._ids[group_id] if 0 < group_id < len(self._ids) else None

    def by_place(self, place: int) -> Group | None:
        group = self.by_id(place >> 32)
        return group if group is not None and group.place == place else None

    @property
    def last_id(self) -> int:
        return len(self._ids) - 1

    def admit(
        self, namespace: bytes, key: bytes, parent_key: bytes, slots: tuple[int, ...], length: int,
        size_class: int, owner: str, kind: int, now: float,
    ) -> Group:  # fmt: skip
        """Make a whole page resident. The caller has checked that it is not. `kind` as `Worth` gives it."""
        name = namespace + key
        assert name not in self._groups, "a page is admitted once"
        self._generation = self._generation % 0xFFFFFFFF + 1
        group_id = self._free_ids.pop() if self._free_ids else len(self._ids)
        group = Group(group_id, self._generation, namespace, key, parent_key, slots, length, size_class, owner, now)
        if group_id == len(self._ids):
            self._ids.append(group)
        else:
            self._ids[group_id] = group
        self._groups[name] = group
        parent = self._groups.get(namespace + parent_key) if parent_key != NO_PARENT else None
        if parent is not None and parent.size_class == size_class:
            hang(group, parent)
            self.departures.withdraw(parent)
        self.departures.enter(group, kind, now)
        if self.follower is not None:
            self.follower.came(RAM, name, parent_key)
        return group

    def remove(self, group: Group, now: float) -> None:
        """Forget a leaf. Its parent may become one."""
        assert group.is_leaf, "eviction is leaf first"
        name = group.namespace + group.key
        del self._groups[name]
        if self.follower is not None:
            self.follower.left(RAM, name)
        self._ids[group.id] = None
        self._free_ids.append(group.id)
        self.departures.leave(group)
        parent = group.parent
        if parent is not None:
            unhang(group)
            self.departures.offer(parent, now)

    def lineage(self, namespace: bytes, key: bytes) -> list[Group]:
        """A page after all that come before it, as far as they are resident together; empty where it is not."""
        found: list[Group] = []
        group = self.get(namespace, key)
        while group is not None:
            found.append(group)
            group = group.parent
        return found[::-1]

    def with_descendants(self, groups: list[Group]) -> list[Group]:
        """The groups and all that hangs below them, each before its parent."""
        found: dict[int, Group] = {}
        todo = list(groups)
        while todo:
            group = todo.pop()
            if group.id not in found:
                found[group.id] = group
                todo += children(group)
        return sorted(found.values(), key=lambda g: -g.depth)

    def disown(self, group: Group, now: float) -> list[Group]:
        """Make the group's children roots and correct every depth below; the groups whose depth changed."""
        below = [g for g in reversed(self.with_descendants([group])) if g is not group]
        for other in below:  # parents before children
            if other.parent is group:
                unhang(other)
                other.depth = 0
            elif other.parent is not None:
                other.depth = other.parent.depth + 1
        self.departures.offer(group, now)
        return below

    def tips(self, limit: int) -> tuple[list[Group], int]:
        """The chains' deepest pages, most recently used first, and how many there are."""
        leaves = [group for group in self if group.is_leaf]
        return heapq.nlargest(limit, leaves, key=lambda group: group.last_use), len(leaves)

    def faults(self, start: int, end: int) -> list[str]:
        """Broken invariants of the groups with ids from `start` to before `end`, in words."""
        found: list[str] = []
        for group in filter(None, self._ids[start:end]):
            if self.get(group.namespace, group.key) is not group:
                found.append(f"group {group.id} cannot be found by its name")
            if self.by_place(group.place) is not group:
                found.append(f"group {group.id} is not at its id")
            if group.parent is not None:
                if self.by_place(group.parent.place) is not group.parent:
                    found.append(f"group {group.id} outlives its parent")
                if group.depth != group.parent.depth + 1:
                    found.append(f"group {group.id} has a wrong depth")
            elif group.depth:
                found.append(f"group {group.id} has a depth and no parent")
            if any(child.parent is not group for child in children(group)):
                found.append(f"group {group.id} lists a child that is not its own")
            if group.leases < 0 or group.pins < 0:
                found.append(f"group {group.id} has a negative lease count")
            if wrong := self.departures.fault(group):
                found.append(wrong)
        return found
