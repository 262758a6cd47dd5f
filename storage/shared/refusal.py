"""Whether a shared tier may write. Where the medium refuses (full, read-only, not ours to write) the tier reads on.

What was refused is tried again after RETRY_S; until then nothing is asked of the medium. Why nothing is written at the
moment is a counter that is 1 as long as it is so: "disk_full", "no_permission" or "read_only".
"""

import errno
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvd.storage.tier import TierError, WriteRefused

RETRY_S: Final = 30.0
_REASONS: Final = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EACCES: "no_permission",
    errno.EPERM: "no_permission",
    errno.EROFS: "read_only",
}


class Refusal:
    """That writing was refused lately, or not."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._until = 0.0

    @property
    def lasts(self) -> bool:
        """There is no use in writing now."""
        return time.monotonic() < self._until

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Around every write. Raises WriteRefused, or TierError for what else the medium does."""
        try:
            yield
        except OSError as error:
            reason = _REASONS.get(error.errno or 0)
            if reason is None:
                raise TierError(f"shared tier: {error}", "is the file system there, and sound?") from error
            self._tell(reason)
            self._until = time.monotonic() + RETRY_S
            raise WriteRefused(f"shared tier: {error}", "make room, or let the user of kvd write there") from error
        if not self.lasts:  # else it was something small that had room still
            self._tell("")

    def _tell(self, now: str) -> None:
        for reason in {*_REASONS.values()} - {now}:
            self._counters.pop(reason, None)
        if now:
            self._counters[now] = 1


def is_refusal(error: OSError) -> bool:
    return error.errno in _REASONS
