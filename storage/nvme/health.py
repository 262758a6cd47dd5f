"""Whether the tier works: every call passes here, what the disk refuses is counted, and too much of it is said.

What the disk refuses costs the pages concerned. When it refuses STRIKES calls in a row, and all of each, the call
raises TierError, and so does the next that it refuses. Once nobody knows what is on the disk, every call raises until
the tier is opened again.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvd.storage.tier import TierError

STRIKES: Final = 5


class Health:
    """Calls in progress, what the disk refused of them, and why no call works any more."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.strikes = 0
        self._broken = ""
        self._idle = threading.Condition()
        self._inside = 0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around every call: refused where the tier is broken or closed, awaited by `close`."""
        with self._idle:
            if self._broken:
                raise TierError(self._broken, "open it again")
            self._inside += 1
        try:
            with self.disk():
                yield
        finally:
            with self._idle:
                self._inside -= 1
                self._idle.notify_all()

    @contextmanager
    def disk(self) -> Iterator[None]:
        """What the disk raises and nobody expected here."""
        try:
            yield
        except OSError as why:
            self.counters["io_error"] += 1
            raise TierError(f"the disk fails: {why}") from why

    def judge(self, failed: int, tried: int) -> None:
        """Raises when the disk did nothing of what was tried in too many calls in a row."""
        if 0 < tried == failed:
            self.strikes += 1
            if self.strikes >= STRIKES:
                raise TierError(f"the disk failed in {self.strikes} calls in a row", "look at the kernel's log")
        elif tried:
            self.strikes = 0

    def give_up(self, why: str) -> None:
        """No call works from now on."""
        self._broken = why

    def close(self) -> None:
        """No call works from now on; waits for those in progress. May be called twice."""
        with self._idle:
            self._broken = self._broken or "the tier is closed"
            while self._inside:
                self._idle.wait()
