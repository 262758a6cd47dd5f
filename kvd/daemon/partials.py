"""Pages of which some shards are committed and others are not yet: not visible. Pure: time is a number."""

from dataclasses import dataclass, field

TTL_S = 60.0


@dataclass(slots=True)
class Partial:
    """One page. `slots` are by shard."""

    parent: bytes
    shards: int
    length: int
    born: float
    slots: dict[int, int] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.slots) == self.shards

    @property
    def in_order(self) -> tuple[int, ...]:
        return tuple(self.slots[shard] for shard in range(self.shards))


@dataclass(slots=True)
class Partials:
    """All of them; a page that became whole is gone from here."""

    _pages: dict[bytes, Partial] = field(default_factory=dict)  # namespace + key

    def has(self, namespace: bytes, key: bytes, shard: int) -> bool:
        partial = self._pages.get(namespace + key)
        return partial is not None and shard in partial.slots

    def add(
        self, namespace: bytes, key: bytes, parent: bytes, shard: int, shards: int, length: int, slot: int, now: float
    ) -> Partial | None:
        """The page with this shard in it; None when it does not fit what is there."""
        name = namespace + key
        partial = self._pages.setdefault(name, Partial(parent, shards, length, now))
        if (partial.shards, partial.length) != (shards, length) or shard in partial.slots:
            return None
        partial.slots[shard] = slot
        if partial.whole:
            del self._pages[name]
        return partial

    def expire(self, now: float) -> list[Partial]:
        """Take out what has waited too long for its other shards."""
        overdue = [name for name, partial in self._pages.items() if partial.born + TTL_S <= now]
        return [self._pages.pop(name) for name in overdue]

    def slots(self) -> set[int]:
        return {slot for partial in self._pages.values() for slot in partial.slots.values()}
