"""A tier of equal blocks that replays a trace. Pure: time is the trace's.

A block is hit when it is resident at the moment it is asked for. `kvd` is the daemon's own policy with its own rule
that a page stays as long as a page below it does, and refuses as a full tier below RAM does what is worth less than
all it holds; the references are flat, as they are published.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile

from kvd.ctl.simulate.reference import Arc, Lru, S3Fifo, TinyLfu, belady
from kvd.ctl.simulate.traces import Request
from kvd.storage.policy import Policy
from kvd.storage.worth import Worth, trait

FLAT: dict[str, Callable[[int], Lru | S3Fifo | Arc | TinyLfu]] = {
    "lru": Lru, "s3fifo": S3Fifo, "arc": Arc, "tinylfu": TinyLfu,
}  # fmt: skip
NAMES = ("kvd", "opt", *FLAT)


def hit_rate(policy: str, requests: Sequence[Request], capacity: int) -> float:
    """Hits per block asked for."""
    asked = sum(len(request.blocks) for request in requests)
    if policy == "opt":
        hits = belady([block for request in requests for block in request.blocks], capacity)
    elif policy == "kvd":
        chains = Chains(capacity)
        hits = sum(chains.replay(request) for request in requests)
    else:
        ask = FLAT[policy](capacity).ask
        hits = sum(ask(block) for request in requests for block in request.blocks)
    return hits / asked


class Chains:
    """The production policy over one tier, leaves first."""

    def __init__(self, capacity: int) -> None:
        self.worth = Worth(capacity)
        self.policy = Policy(self.worth)
        self._free = list(range(capacity - 1, -1, -1))
        self._place: dict[int, int] = {}  # block -> where it lies
        self._block = [0] * capacity
        self._parent = [-1] * capacity
        self._children = [0] * capacity

    def replay(self, request: Request) -> int:
        """One request: how many of its blocks were there.

        What the daemon knows of a page is what it is told: reads of a prefix, and what is stored after it.
        """
        blocks, now, worth = request.blocks, request.at, self.worth
        found = sum(1 for _ in takewhile(self._place.__contains__, blocks))
        fresh = sum(not worth.seen(block) for block in blocks[found:])
        hits, parent, whole = 0, -1, True
        for depth, block in enumerate(blocks):
            of = trait(depth, fresh if depth >= found else 0, depth == len(blocks) - 1)
            kind = worth.use(block, of, now)
            place = self._place.get(block)
            if place is not None:
                hits += 1
                self.policy.use(place, kind, now)
            elif whole:
                place = self._admit(block, parent, kind, now)
                whole = place is not None
            if place is not None:
                parent = place
        if worth.due:
            worth.learn(now)
        return hits

    def check(self) -> None:
        """Raise when a page is without its parent, or is counted wrongly."""
        below = [0] * len(self._children)
        for place in self._place.values():
            parent = self._parent[place]
            if parent >= 0:
                below[parent] += 1
                assert self._place.get(self._block[parent]) == parent, f"page {place} outlives its parent"
        assert all(below[place] == self._children[place] for place in self._place.values()), (
            "a wrong count of children"
        )

    def _admit(self, block: int, parent: int, kind: int, now: float) -> int | None:
        if not self._free:
            for victim in self.policy.victims(1, now, lambda place: place != parent, self.worth.density(kind)):
                self._evict(victim, now)
            if not self._free:
                return None
        place = self._free.pop()
        self._place[block] = place
        self._block[place], self._parent[place], self._children[place] = block, parent, 0
        self.policy.enter(place, kind, now)
        self.policy.offer(place, now)
        if parent >= 0:
            self._children[parent] += 1
            self.policy.withdraw(parent)
        return place

    def _evict(self, place: int, now: float) -> None:
        del self._place[self._block[place]]
        self._free.append(place)
        parent = self._parent[place]
        if parent >= 0:
            self._children[parent] -= 1
            if not self._children[parent]:
                self.policy.offer(parent, now)
