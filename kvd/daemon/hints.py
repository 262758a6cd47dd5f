"""What a lower tier is told so that it keeps what is worth keeping: what was learnt, and which of its pages are used.

Pure but for the tier it is handed. Uses that it was not told of cost it a worse choice and nothing else, so what has
gathered beyond MOST between two ticks is dropped.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from kvd.daemon.group import Group
from kvd.storage.tier import Name
from kvd.storage.worth import Ranks, Worth

MOST: Final = 1 << 16  # pages


class Listener(Protocol):
    """A lower tier, as far as hints need it."""

    @property
    def ready(self) -> bool: ...

    def judge(self, density: Sequence[float]) -> None: ...

    def used(self, pages: Sequence[tuple[Name, int]]) -> None: ...


class Hints:
    """To one lower tier, whose bit is `tier`."""

    def __init__(self, worth: Worth, tier: int, listener: Listener) -> None:
        self._worth = worth
        self._tier = tier
        self._listener = listener
        self._used: dict[Name, int] = {}
        self._told: Ranks | None = None

    def used(self, group: Group, kind: int) -> None:
        """Somebody used a page, which is of this kind now."""
        if group.below & self._tier and len(self._used) < MOST:
            self._used[group.namespace + group.key] = kind

    def tick(self) -> None:
        if not self._listener.ready:
            self._told = None  # the next one knows nothing
            self._used.clear()
            return
        if self._told is not self._worth.ranks:
            self._told = self._worth.ranks
            self._listener.judge(self._told.density)
        if self._used:
            self._listener.used(list(self._used.items()))
            self._used.clear()
