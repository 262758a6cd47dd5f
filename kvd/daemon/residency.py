"""Which pages are resident, how they hang together, and which leaves first. Pure: time is a number.

The unit is the page *group*: one page of one namespace with all its shards. Groups form chains by their
parent's key. Eviction takes leaves only, in second-chance (CLOCK) order per size class: a page used since the
hand last passed is passed over once, so one scan of new prompts does not wash out what is reused.

Always true: an ancestor that a group counts in its `depth` stays resident as long as the group does.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

NO_PARENT = bytes(32)


@dataclass(slots=True, eq=False)
class Group:
    """A resident page: `slots[r]` is where shard r is."""

    id: int
    generation: int
    namespace: bytes
    key: bytes
    parent_key: bytes
    slots: tuple[int, ...]
    length: int  # payload bytes of one shard
    size_class: int  # slot bytes
    last_use: float
    parent: "Group | None" = None
    first_child: "Group | None" = None
    previous: "Group | None" = None  # among the parent's children
    next: "Group | None" = None
    depth: int = 0
    leases: int = 0
    pins: int = 0
    used: bool = False  # since the hand last passed
    leaving: bool = False  # chosen for eviction, not gone yet
    below: int = 0  # a bit for each tier below that holds it too

    @property
    def place(self) -> int:
        """What the index and the lease tables call this group."""
        return self.id << 32 | self.generation

    @property
    def is_leaf(self) -> bool:
        return self.first_child is None

    @property
    def held(self) -> bool:
        return self.leases > 0 or self.pins > 0 or self.leaving


@dataclass(slots=True)
class Residency:
    """All resident groups."""

    _groups: dict[bytes, Group] = field(default_factory=dict)  # namespace + key
    _ids: list[Group | None] = field(default_factory=lambda: [None])  # id 0 is never used
    _free_ids: list[int] = field(default_factory=list)
    _generation: int = 0
    _leaves: dict[int, OrderedDict[int, Group]] = field(default_factory=dict)  # size class -> id -> group

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
        size_class: int, now: float,
    ) -> Group:  # fmt: skip
        """Make a whole page resident. The caller has checked that it is not."""
        name = namespace + key
        assert name not in self._groups, "a page is admitted once"
        self._generation = self._generation % 0xFFFFFFFF + 1
        group_id = self._free_ids.pop() if self._free_ids else len(self._ids)
        group = Group(group_id, self._generation, namespace, key, parent_key, slots, length, size_class, now)
        if group_id == len(self._ids):
            self._ids.append(group)
        else:
            self._ids[group_id] = group
        self._groups[name] = group
        parent = self._groups.get(namespace + parent_key) if parent_key != NO_PARENT else None
        if parent is not None and parent.size_class == size_class:
            _hang(group, parent)
            self._leaves[parent.size_class].pop(parent.id, None)
        self._leaves.setdefault(size_class, OrderedDict())[group_id] = group
        return group

    def touch(self, group: Group, now: float) -> None:
        """A worker read or asked for the page."""
        group.last_use = now
        group.used = True

    def remove(self, group: Group) -> None:
        """Forget a leaf. Its parent may become one, and is then next in line unless it was used since."""
        assert group.is_leaf, "eviction is leaf first"
        del self._groups[group.namespace + group.key]
        self._ids[group.id] = None
        self._free_ids.append(group.id)
        leaves = self._leaves[group.size_class]
        leaves.pop(group.id, None)
        parent = group.parent
        if parent is not None:
            _unhang(group)
            if parent.is_leaf:
                leaves[parent.id] = parent
                if parent.last_use <= group.last_use:
                    leaves.move_to_end(parent.id, last=False)

    def size_classes(self) -> list[int]:
        return list(self._leaves)

    def oldest_use(self, size_class: int) -> float | None:
        """When the next candidate of a class was last used; None when the class has no leaf."""
        leaves = self._leaves.get(size_class)
        return next(iter(leaves.values())).last_use if leaves else None

    def candidate(self, size_class: int) -> Group | None:
        """The next leaf of a class to evict, or None when all are held. Moves the hand; removes nothing."""
        leaves = self._leaves.get(size_class)
        if not leaves:
            return None
        for _ in range(2 * len(leaves)):
            group = next(iter(leaves.values()))
            if not group.used and not group.held:
                return group
            group.used = False
            leaves.move_to_end(group.id)
        return None

    def victims(self, size_class: int, want: int) -> list[Group]:
        """Up to `want` groups in the order they may be removed: leaves, each followed by idle only-child parents.

        They are marked as leaving; the caller removes each one or calls `spare`.
        """
        chosen: list[Group] = []
        while len(chosen) < want:
            group = self.candidate(size_class)
            if group is None:
                break
            while group is not None and len(chosen) < want:
                group.leaving = True
                chosen.append(group)
                parent = group.parent
                alone = parent is not None and _only_child(group) and not parent.used and not parent.held
                group = parent if alone else None
        return chosen

    def spare(self, group: Group, now: float) -> None:
        """A victim turned out to be held: somebody looked it up. To the end of the line."""
        group.leaving = False
        group.last_use = now
        leaves = self._leaves[group.size_class]
        if group.id in leaves:
            leaves.move_to_end(group.id)

    def with_descendants(self, groups: list[Group]) -> list[Group]:
        """The groups and all that hangs below them, each before its parent."""
        found: dict[int, Group] = {}
        todo = list(groups)
        while todo:
            group = todo.pop()
            if group.id not in found:
                found[group.id] = group
                todo += _children(group)
        return sorted(found.values(), key=lambda g: -g.depth)

    def disown(self, group: Group) -> list[Group]:
        """Make the group's children roots and correct every depth below; the groups whose depth changed."""
        below = [g for g in reversed(self.with_descendants([group])) if g is not group]
        for other in below:  # parents before children
            if other.parent is group:
                _unhang(other)
                other.depth = 0
            elif other.parent is not None:
                other.depth = other.parent.depth + 1
        if below:
            self._leaves.setdefault(group.size_class, OrderedDict())[group.id] = group
        return below

    def tips(self, limit: int) -> tuple[list[Group], int]:
        """The chains' deepest pages, most recently used first, and how many there are."""
        leaves = [group for line in self._leaves.values() for group in line.values()]
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
            if any(child.parent is not group for child in _children(group)):
                found.append(f"group {group.id} lists a child that is not its own")
            if group.leases < 0 or group.pins < 0:
                found.append(f"group {group.id} has a negative lease count")
            if (group.id in self._leaves.get(group.size_class, {})) != group.is_leaf:
                found.append(f"group {group.id} is in the wrong line")
        return found


def _hang(group: Group, parent: Group) -> None:
    group.parent, group.depth = parent, parent.depth + 1
    group.next = parent.first_child
    if group.next is not None:
        group.next.previous = group
    parent.first_child = group


def _unhang(group: Group) -> None:
    parent = group.parent
    assert parent is not None, "it hangs somewhere"
    if group.previous is not None:
        group.previous.next = group.next
    else:
        parent.first_child = group.next
    if group.next is not None:
        group.next.previous = group.previous
    group.parent = group.previous = group.next = None


def _children(group: Group) -> Iterator[Group]:
    child = group.first_child
    while child is not None:
        yield child
        child = child.next


def _only_child(group: Group) -> bool:
    return group.previous is None and group.next is None
