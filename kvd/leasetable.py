"""A worker's own lease table: how a lookup holds pages without sending a message.

The worker creates it (a sealed memfd, so that nobody can shrink it under the daemon) and hands it over with
Hello; it writes, the daemon only reads. Native 64-bit words, `ROWS` rows of 16 bytes:

    [place u64: group id << 32 | generation; 0: free][expires f64: CLOCK_MONOTONIC seconds]

Promise: the daemon takes a page out of the index *before* it looks at the tables, and puts it back if a live row
names it; a worker writes its row and *then* looks whether the page is still in the index. One of the two sees
the other. When the worker dies its table goes with it.
"""

import fcntl
import mmap
import os
import threading
from typing import Final

from kvd.errors import PeerError

ROWS: Final = 1024
TABLE_BYTES: Final = 16 * ROWS
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class LeaseTable:
    """Write side. Thread-safe: lookups come from several threads of a worker."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("kvd-leases", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, TABLE_BYTES)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self._map = mmap.mmap(self.fd, TABLE_BYTES)
        self._places = memoryview(self._map).cast("Q")
        self._expires = memoryview(self._map).cast("d")
        self._given = [0] * ROWS  # ROWS times how often each row was given out
        self._next = 0
        self._lock = threading.Lock()

    def hold(self, places: tuple[int, ...], now: float, ttl_s: float) -> tuple[int, ...] | None:
        """Hold page groups for `ttl_s`: what to `drop`, or None when too many leases are live."""
        held: list[int] = []
        with self._lock:
            for place in places:
                row = self._free_row(now)
                if row is None:
                    break
                self._expires[2 * row + 1] = now + ttl_s
                self._places[2 * row] = place
                self._given[row] += ROWS
                held.append(self._given[row] + row)
        if len(held) == len(places):
            return tuple(held)
        self.drop(tuple(held))
        return None

    def _free_row(self, now: float) -> int | None:
        for _ in range(ROWS):
            row = self._next
            self._next = (row + 1) % ROWS
            if self._places[2 * row] == 0 or self._expires[2 * row + 1] <= now:
                return row
        return None

    def drop(self, held: tuple[int, ...]) -> None:
        """Let go of what `hold` returned; what ran out since, and was given to another, stays."""
        with self._lock:
            for one in held:
                row = one % ROWS
                if self._given[row] + row == one:
                    self._places[2 * row] = 0

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            self._places.release()
            self._expires.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1


class LeaseTableReader:
    """The daemon's view of a worker's table. Takes ownership of `fd` and closes it."""

    def __init__(self, fd: int) -> None:
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if seals & _SEALS != _SEALS or os.fstat(fd).st_size != TABLE_BYTES:
                # Unsealed, a peer could truncate it and kill the daemon with SIGBUS.
                raise PeerError("lease table is not a sealed memfd of the agreed size")
            self._map = mmap.mmap(fd, TABLE_BYTES, prot=mmap.PROT_READ)
        except OSError as error:
            raise PeerError(f"lease table cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        self._places = memoryview(self._map).cast("Q")
        self._expires = memoryview(self._map).cast("d")

    def live(self, now: float) -> set[int]:
        """Places held now."""
        places, expires = self._places.tolist()[::2], self._expires.tolist()[1::2]
        return {place for place, until in zip(places, expires, strict=True) if place and until > now}

    def close(self) -> None:
        if not self._map.closed:
            self._places.release()
            self._expires.release()
            self._map.close()
