"""One resident page with all its shards, and its place among its relatives. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

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
    owner: str  # tenant
    last_use: float
    parent: "Group | None" = None
    first_child: "Group | None" = None
    previous: "Group | None" = None  # among the parent's children
    next: "Group | None" = None
    depth: int = 0
    leases: int = 0
    pins: int = 0
    leaving: bool = False  # chosen for eviction, not gone yet
    below: int = 0  # a bit for each tier below that holds it too

    @property
    def place(self) -> int:
        """What the index and the lease tables call this group."""
        return self.id << 32 | self.generation

    @property
    def bytes(self) -> int:
        """Of all its slots."""
        return self.size_class * len(self.slots)

    @property
    def is_leaf(self) -> bool:
        return self.first_child is None

    @property
    def waits(self) -> bool:
        """It may be chosen to leave once nobody reads it."""
        return self.first_child is None and not self.pins and not self.leaving

    @property
    def held(self) -> bool:
        return self.leases > 0 or self.pins > 0 or self.leaving


def hang(group: Group, parent: Group) -> None:
    group.parent, group.depth = parent, parent.depth + 1
    group.next = parent.first_child
    if group.next is not None:
        group.next.previous = group
    parent.first_child = group


def unhang(group: Group) -> None:
    parent = group.parent
    assert parent is not None, "it hangs somewhere"
    if group.previous is not None:
        group.previous.next = group.next
    else:
        parent.first_child = group.next
    if group.next is not None:
        group.next.previous = group.previous
    group.parent = group.previous = group.next = None


def children(group: Group) -> Iterator[Group]:
    child = group.first_child
    while child is not None:
        yield child
        child = child.next
