"""Pages on their way from a lower tier into RAM: fetched when a lookup finds them, long before they are read.

Pure but for the tiers it is handed: time is a number. A page that is being fetched owns slots which nobody reads; it
is admitted when its bytes have arrived, and promised to everybody who asked for it meanwhile.

Always true: slots are given back only after the tier can write into them no more (see kvd.daemon.below).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from kvd import wire
from kvd.daemon.speed import Disk
from kvd.daemon.stock import Stock
from kvd.storage.arena import slot_bytes_for
from kvd.storage.tier import Name, Page

MAX_FETCHES = 1024  # pages on their way at once: the prefetch depth
# One request to the tier is small, because what has arrived is admitted while the rest is read: what was read of a
# prefix when its reader gives up is a hit.
_AT_ONCE = 16  # pages
_AT_ONCE_S = 0.05
_AT_ONCE_BYTES = 4 << 20  # where the tier's speed is not known


class Source(Protocol):
    """A lower tier, as far as promotion needs it."""

    @property
    def ready(self) -> bool: ...

    def load(
        self, length: int, wanted: Sequence[tuple[Name, list[int]]], done: Callable[[list[Page | None]], None]
    ) -> None: ...


@dataclass(slots=True)
class Lower:
    """A tier that pages come from: its bit, what is known of its speed, how many pages came and did not."""

    bit: int
    source: Source
    disk: Disk = field(default_factory=Disk)
    came: int = 0
    failed: int = 0


@dataclass(slots=True)
class Fetch:
    """One page on its way. `askers` are sessions and until when each wants it held."""

    lower: Lower
    spec: wire.NamespaceSpec
    key: bytes
    slots: tuple[int, ...]
    askers: dict[int, float] = field(default_factory=dict)
    late_at: float = float("inf")  # when it should have been here for long

    @property
    def size(self) -> int:
        return self.spec.page_bytes * len(self.slots)


@dataclass(slots=True, eq=False)
class Waiter:
    """Somebody who wants to be told when these pages are here, or not to be had, or time is up."""

    names: set[Name]
    until: float
    then: Callable[[], None]


class Promotion:
    """`tiers` are the lower tiers, the fastest first."""

    def __init__(self, stock: Stock) -> None:
        self.tiers: list[Lower] = []
        self.clock: Callable[[], float] = lambda: 0.0
        self._stock = stock
        self._arena = stock.arena
        self._leases = stock.leases
        self._residency = stock.residency
        self._counters = stock.counters
        self._fetches: dict[Name, Fetch] = {}
        self._unsent: list[Fetch] = []
        self._waiters: list[Waiter] = []

    def fetch(self, session: int, spec: wire.NamespaceSpec, key: bytes, until: float, now: float) -> bool:
        """Begin to fetch a page that is not in RAM, or join who does. False when it cannot be had. Then `send`."""
        name = spec.digest + key
        fetch = self._fetches.get(name)
        if fetch is None:
            lower = self.where(spec.digest, key)
            if lower is None:
                return False
            if len(self._fetches) >= MAX_FETCHES:
                self._counters["promotions_refused"] += 1
                return False
            slots = self._take(spec, now)
            if slots is None:
                return False
            fetch = self._fetches[name] = Fetch(lower, spec, key, slots)
            self._unsent.append(fetch)
        fetch.askers[session] = max(until, fetch.askers.get(session, until))
        return True

    def bury(self, session: int) -> None:
        """It has ended: what comes is promised to it no more."""
        for fetch in self._fetches.values():
            fetch.askers.pop(session, None)

    def where(self, namespace: bytes, key: bytes) -> Lower | None:
        """The tier that would be asked for a page, or None: it is in RAM, or nowhere that can be asked."""
        held = self._stock.below(namespace, key) if self.tiers else 0
        return next((lower for lower in self.tiers if held & lower.bit and lower.source.ready), None)

    def _take(self, spec: wire.NamespaceSpec, now: float) -> tuple[int, ...] | None:
        slots: list[int] = []
        for _ in range(spec.shards):
            slot = self._stock.space.take((slot_bytes_for(spec.page_bytes), spec.tenant), now, spec.shards)
            if slot is None:
                for taken in slots:
                    self._arena.give(taken)
                self._counters["promotions_no_room"] += 1
                return None
            slots.append(slot)
        return tuple(slots)

    def send(self) -> None:
        """Ask the tiers for what `fetch` collected."""
        unsent, self._unsent = self._unsent, []
        for lower in self.tiers if unsent else ():
            mine = [fetch for fetch in unsent if fetch.lower is lower]
            pages = _batch_pages(lower.disk, mine[0].size) if mine else 1
            for at in range(0, len(mine), pages):
                batch = mine[at : at + pages]
                wanted = [(f.spec.digest + f.key, [self._arena.offset(slot) for slot in f.slots]) for f in batch]
                now = self.clock()
                lower.disk.begun(sum(f.size for f in batch), now)
                for fetch in batch:
                    fetch.late_at = lower.disk.late(now)
                lower.source.load(batch[0].spec.page_bytes, wanted, partial(self._arrived, lower, batch))

    def _arrived(self, lower: Lower, batch: list[Fetch], pages: list[Page | None]) -> None:
        now = self.clock()
        came = sum(fetch.size for fetch, page in zip(batch, pages, strict=True) if page is not None)
        lower.disk.ended(sum(fetch.size for fetch in batch), came, now)
        for fetch, page in zip(batch, pages, strict=True):
            del self._fetches[fetch.spec.digest + fetch.key]
            if page is None or self._residency.get(fetch.spec.digest, fetch.key) is not None:
                for slot in fetch.slots:
                    self._arena.give(slot)
                if page is None:
                    self._stock.below_lacks(lower.bit, fetch.spec.digest, fetch.key)
                    lower.failed += 1
                continue
            group = self._stock.admit_page(page, fetch.slots, now)
            self._counters["pages_promoted"] += 1
            lower.came += 1
            for session, until in fetch.askers.items():
                self._leases.promise(session, (group,), until)
        self._settle(now)

    # -- waiting -------------------------------------------------------------------------------------------

    def on_the_way(self, namespace: bytes, keys: Sequence[bytes]) -> set[Name]:
        """Which of these pages are being fetched."""
        return {namespace + key for key in keys if namespace + key in self._fetches} if self._fetches else set()

    def own(self, session: int, lower: Lower, namespace: bytes, parent: bytes) -> int:
        """Bytes that are coming for a session before the page after `parent`: 0 unless that page is coming too."""
        if namespace + parent not in self._fetches:
            return 0
        return sum(f.size for f in self._fetches.values() if f.lower is lower and session in f.askers)

    def wait(self, names: set[Name], until: float, then: Callable[[], None]) -> float:
        """Call `then` once: when none of these pages is on its way any more, or in a `tick` from what is returned on.

        That is `until`, or earlier: when a tier turns out to be much slower than it was known to be.
        """
        late_at = max((fetch.late_at for name in names if (fetch := self._fetches.get(name))), default=until)
        self._waiters.append(Waiter(names, min(until, late_at), then))
        return min(until, late_at)

    def tick(self, now: float) -> None:
        """Let go of who has waited long enough."""
        self._settle(now)

    def _settle(self, now: float) -> None:
        over = [w for w in self._waiters if w.until <= now or not any(name in self._fetches for name in w.names)]
        for waiter in over:
            self._waiters.remove(waiter)
        for waiter in over:
            waiter.then()

    # -- bookkeeping ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._fetches)

    def slots(self) -> set[int]:
        return {slot for fetch in self._fetches.values() for slot in fetch.slots}


def _batch_pages(disk: Disk, page_bytes: int) -> int:
    size = disk.bytes_per_s * _AT_ONCE_S if disk.known else _AT_ONCE_BYTES
    return max(1, min(_AT_ONCE, int(size // page_bytes)))
