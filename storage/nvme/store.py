"""The tier itself: opened, asked and closed. What it does is in the modules that it puts together here.

Threads: one put or remove at a time (`ledger.writing`), any number of gets beside it.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kvd.storage.nvme.catalog import Catalog, unpack
from kvd.storage.nvme.health import Health
from kvd.storage.nvme.ledger import Ledger
from kvd.storage.nvme.ranking import Ranking
from kvd.storage.nvme.segments import Segments
from kvd.storage.nvme.space import Space
from kvd.storage.nvme.transfers import Transfers
from kvd.storage.nvme.writing import Writing
from kvd.storage.quota import Share
from kvd.storage.tier import Buffers, Name, News, Page, TierError, Usage

EXPIRE_EVERY_S, EXPIRE_AT_ONCE = 10.0, 4096  # pages that outstayed their time to live


class NvmeTier:
    """Pages on a local disk."""

    def __init__(
        self, folder: Path, size_bytes: int, segment_bytes: int = 256 << 20, threads: int = 4,
        ttl_s: float | None = None, mount_point: Path | None = None,
        shares: Mapping[str, Share] | None = None,
    ) -> None:  # fmt: skip
        """Opens or makes the tier in `folder`, of at most `size_bytes`. Raises TierError where it cannot.

        Where the disk has to be mounted at `mount_point`, nothing is written while it is not.
        """
        if mount_point is not None and not os.path.ismount(mount_point):
            raise TierError(f"nothing is mounted at {mount_point}", f"mount the disk that {folder} is to be on")
        self._ttl_s = ttl_s
        self._expire_at = 0.0
        self._limit = size_bytes // segment_bytes
        if self._limit < 1:
            raise TierError(f"{size_bytes} bytes hold no segment of {segment_bytes}", "give the tier more room")
        self._segment_bytes = segment_bytes
        self._health = Health()
        self.counters = self._health.counters
        self._lock_file = _lock(folder)
        try:
            self._catalog = Catalog(folder / "catalog", segment_bytes, max(1 << 30, size_bytes // 8))
        except BaseException:
            os.close(self._lock_file)
            raise
        self._segments = Segments(folder, segment_bytes, self._catalog.uuid)
        self._transfers = Transfers(self._segments, threads)
        self._ledger = Ledger(self._catalog, self._limit, self._health, shares or {})
        self._space = Space(self._segments, self._ledger, self._health)
        self._writing = Writing(self._segments, self._ledger, self._space, self._transfers, self._health)
        try:
            with self._health.disk():
                self._recover()
        except BaseException:
            self.close()
            raise

    def _recover(self) -> None:
        for number, slot_bytes in self._segments.open(self._limit).items():
            self._ledger.slots.assign(number, slot_bytes, self._segments.slots_of(slot_bytes))
        self._ledger.recover()
        self._segments.drop_beyond(self._limit)

    def close(self) -> None:
        """Waits for calls in progress. May be called twice."""
        self._health.close()
        self._transfers.close()
        self._segments.close()
        self._catalog.close()
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def put(self, pages: Sequence[tuple[Page, Buffers]]) -> list[bool]:
        with self._health.call(), self._ledger.writing:
            return self._writing.put(pages)

    def remove(self, names: Sequence[Name]) -> None:
        with self._health.call(), self._ledger.writing:
            self._ledger.remove(names)

    def find(self, names: Sequence[Name]) -> list[Page | None]:
        with self._health.call():
            return [record.page if record else None for record in self._ledger.records(names)]

    def get(self, wanted: Sequence[tuple[Name, Buffers]]) -> list[Page | None]:
        with self._health.call():
            values, pinned = self._ledger.pin(wanted)
            try:
                answers = self._transfers.read([(record, wanted[at][1]) for at, record in pinned.items()])
            finally:
                self._ledger.unpin(pinned.values())
            damaged = [at for at, value in enumerate(values) if value and not unpack(wanted[at][0], value)]
            damaged += [at for at, right in zip(pinned, answers, strict=True) if right is False]
            refused = [at for at, right in zip(pinned, answers, strict=True) if right is None]
            if damaged or refused:  # a bad sector stays bad: who asks again is not to wait for it again
                # On a full disk nothing can be dropped either: then it is a miss the next time too.
                with self._ledger.writing, suppress(TierError):
                    self._ledger.drop([(wanted[at][0], values[at]) for at in damaged], "damaged")
                    self._ledger.drop([(wanted[at][0], values[at]) for at in refused], "read_error")
            self._health.judge(len(refused), len(pinned))
            found: list[Page | None] = [None] * len(wanted)
            for (at, record), right in zip(pinned.items(), answers, strict=True):
                found[at] = record.page if right else None
            return found

    def names(self) -> Iterator[list[Name]]:
        pieces = self._catalog.names()
        while True:
            with self._health.call():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def tend(self) -> None:
        if self._ttl_s is not None and time.monotonic() >= self._expire_at:
            self._expire_at = time.monotonic() + min(EXPIRE_EVERY_S, self._ttl_s / 4)
            with self._health.call(), self._ledger.writing:
                self._ledger.expire(self._ttl_s, EXPIRE_AT_ONCE)

    def news(self) -> News:
        with self._health.call():
            return News([], self._ledger.news())

    def judge(self, density: Sequence[float]) -> None:
        self._ledger.judge(Ranking(density))

    def belongs(self, namespace: bytes, tenant: str) -> None:
        with self._ledger.state:
            self._ledger.slots.belongs(namespace, tenant)

    def held(self) -> dict[str, int]:
        with self._ledger.state:
            return self._ledger.slots.held()

    def used(self, pages: Sequence[tuple[Name, int]]) -> None:
        with self._health.call():
            self._ledger.used(pages)

    @property
    def floor(self) -> float:
        with self._ledger.state:
            return self._ledger.slots.floor()

    def usage(self) -> Usage:
        with self._health.call():
            segments = len(self._segments) if self._space.full else self._limit
            with self._ledger.state:
                used = self._ledger.slots.used_bytes
            return Usage(len(self._catalog), used, segments * self._segment_bytes)

    def faults(self) -> list[str]:
        """Broken invariants, in words. Reads every record: for tests and for operators who ask."""
        with self._health.call():
            return self._ledger.faults()


def _lock(folder: Path) -> int:
    """Own the folder until the descriptor is closed, also by death."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as why:
        raise TierError(f"cannot use {folder}: {why}", "the tier needs a folder it may write to") from why
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as why:
        os.close(descriptor)
        raise TierError(f"{folder} is in use by another process", "one kvd per folder") from why
    return descriptor
