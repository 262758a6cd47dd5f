"""New pages on their way from RAM into a lower tier: in the background, batch after batch, never in a request's way.

Pure but for the tier it is handed: time is a number. A page is written some seconds after it came, so that a batch is
large, and stays in RAM as long as it is worth it: when it is evicted later, it is only forgotten here. The queue is
bounded: where the tier cannot keep up, the oldest pages are not written, and nobody waits. So is the time of a batch:
a slow disk gets small ones, for a tier that is silent about one for too long is taken for hung (kvd.daemon.below).
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kvd.daemon.group import Group
from kvd.daemon.stock import Stock
from kvd.storage.tier import Page
from kvd.storage.worth import PINNED, TRAITS

BATCH_BYTES = 64 << 20
_FIRST_BYTES = 8 << 20  # of a tier whose speed is unknown
_QUICK_S, _SLOW_S = 0.5, 2.0  # a batch that takes less is followed by one twice as large, a slower one by one of 1 s
_BATCH_PAGES = 256
MAX_QUEUE = 1 << 16  # pages
_NOBODY = 0  # the session that leases for us; real ones begin at 1
_LEASE_S = 3600.0  # until the tier answers: it always does


class Sink(Protocol):
    """A lower tier, as far as writing back needs it."""

    @property
    def ready(self) -> bool: ...

    def wants(self, density: float, before: int) -> bool: ...

    def store(self, pages: Sequence[tuple[Page, list[int]]], done: Callable[[list[bool]], None]) -> None: ...


class WriteBack:
    """To one lower tier, whose bit is `tier`. `delay_s` is how long a new page waits for others."""

    def __init__(self, stock: Stock, tier: int, sink: Sink, delay_s: float) -> None:
        self._tier = tier
        self._sink = sink
        self._delay_s = delay_s
        self._arena = stock.arena
        self._residency = stock.residency
        self._departures = stock.departures
        self._leases = stock.leases
        self._labels = stock.labels
        self._counters = stock.counters
        self._written = stock.written_below
        self._queue: deque[tuple[float, int]] = deque()  # when it came, its place
        self._writing = 0  # pages of the batch that is under way
        self._began: float | None = None  # when the batch was sent whose time has not been looked at
        self._batch_bytes = _FIRST_BYTES
        self.more: Callable[[], object] = lambda: None  # called when a full batch is done: `tick` soon

    def __len__(self) -> int:
        """Pages that wait or are being written."""
        return len(self._queue) + self._writing

    def admitted(self, group: Group, now: float) -> None:
        """A page has become resident, or was used again."""
        if group.below & self._tier:
            return
        if len(self._queue) >= MAX_QUEUE:
            self._queue.popleft()
            self._counters["writes_back_dropped"] += 1
        self._queue.append((now, group.place))

    def tick(self, now: float, hurry: bool = False) -> None:
        """Send the next batch, unless one is under way. With `hurry`, what has just come too."""
        if self._writing:
            return
        self._pace(now)
        if not self._sink.ready:
            return
        batch: list[Group] = []
        size = 0
        while self._queue and len(batch) < _BATCH_PAGES and size < self._batch_bytes:
            came, place = self._queue[0]
            if came + self._delay_s > now and not hurry:
                break
            self._queue.popleft()
            group = self._residency.by_place(place)
            if group is None or group.below & self._tier or group.leaving or not self._sound(group):
                continue
            density, kind = self._departures.density(group, now), self._departures.kind(group)
            if not group.pins and not self._sink.wants(density, kind // TRAITS):
                self._counters["not_worth_writing"] += 1
                continue
            batch.append(group)
            size += group.size_class * len(group.slots)
        if not batch:
            return
        lease = self._leases.grant(_NOBODY, tuple(batch), now, _LEASE_S)
        pages = [(self._page(group), [self._arena.offset(slot) for slot in group.slots]) for group in batch]
        self._writing = len(batch)
        self._began = now
        # After one that is not full nothing was due: what trickles in is gathered until the next tick, or every page
        # would be a commit on the disk and a file on shared storage.
        full = len(batch) == _BATCH_PAGES or size >= self._batch_bytes

        def done(flags: list[bool]) -> None:
            self._writing = 0
            self._leases.release(lease.id, _NOBODY)
            for group, stored in zip(batch, flags, strict=True):
                if stored:
                    self._written(self._tier, group)
            self._counters["pages_written_back"] += sum(flags)
            self._counters["writes_back_refused"] += len(flags) - sum(flags)
            if full:
                self.more()

        self._sink.store(pages, done)

    def _pace(self, now: float) -> None:
        """How much the next batch may be, after the time that the last one took."""
        if self._began is None:
            return
        took, self._began = now - self._began, None
        if took < _QUICK_S:
            self._batch_bytes = min(2 * self._batch_bytes, BATCH_BYTES)
        elif took > _SLOW_S:
            self._batch_bytes = max(int(self._batch_bytes / took), 1)

    def _sound(self, group: Group) -> bool:
        """Its headers are sound, and it is no page that leaves with its session."""
        spec = self._labels.get(group.namespace)
        if spec is not None and spec.scratch:
            return False
        return all(self._arena.intact(slot, self._arena.header(slot)) for slot in group.slots)

    def _page(self, group: Group) -> Page:
        spec = self._labels.get(group.namespace)
        checksums = tuple(self._arena.header(slot).checksum for slot in group.slots)
        tokens = spec.page_tokens if spec else 0
        kind = PINNED if group.pins else self._departures.kind(group)
        return Page(group.namespace, group.key, group.parent_key, group.length, checksums, tokens, kind)

    def everything(self, now: float) -> None:
        """The tier has said all that it holds: whatever else is resident goes there."""
        self._queue.clear()  # what waits is resident too, or need not be written
        for group in self._residency:
            self.admitted(group, now)
