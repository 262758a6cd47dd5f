"""What a lower tier is told so that it keeps what is worth keeping: what was learnt, and which of its pages are used.

Pure but for the tier it is handed. Uses that it was not told of cost it a worse choice and nothing else, so what has
gathered beyond MOST between two ticks is dropped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from kvd.daemon.group import Group
from kvd.storage.tier import Name
from kvd.storage.worth import PINNED, Ranks, Worth

MOST: Final = 1 << 16  # pages


class Listener(Protocol):
    """A lower tier, as far as hints need it."""

    @property
    def ready(self) -> bool: ...

    def judge(self, density: Sequence[float]) -> None: ...

    def used(self, pages: Sequence[tuple[Name, int]]) -> None: ...

    def belongs(self, namespace: bytes, tenant: str) -> None: ...


class Hints:
    """To one lower tier, whose bit is `tier`."""

    def __init__(
        self, worth: Worth, tier: int, listener: Listener, pins: Callable[[], Iterable[Name]],
        tenants: Callable[[], Iterable[tuple[bytes, str]]],
    ) -> None:  # fmt: skip
        """`pins`: the names of all pages that are pinned. `tenants`: namespaces, and whose they are."""
        self._pins = pins
        self._tenants = tenants
        self._worth = worth
        self._tier = tier
        self._listener = listener
        self._used: dict[Name, int] = {}
        self._told: Ranks | None = None

    def used(self, group: Group, kind: int) -> None:
        """Somebody used a page, which is of this kind now."""
        if group.pins:
            kind = PINNED
        if group.below & self._tier and len(self._used) < MOST:
            self._used[group.namespace + group.key] = kind

    def pinned(self, names: Iterable[Name]) -> None:
        """These pages stay, whether the tier has them now or gets them back."""
        self._used.update(dict.fromkeys(names, PINNED))

    def unpinned(self, kinds: Mapping[Name, int]) -> None:
        """These pages may leave again."""
        self._used.update(kinds)

    def belongs(self, namespace: bytes, tenant: str) -> None:
        """A worker has joined, and said whose pages these are."""
        if self._told is not None:
            self._listener.belongs(namespace, tenant)

    def tick(self) -> None:
        if not self._listener.ready:
            self._told = None  # the next one knows nothing
            self._used.clear()
            return
        if self._told is None:
            self.pinned(self._pins())
            for namespace, tenant in self._tenants():
                self._listener.belongs(namespace, tenant)
        if self._told is not self._worth.ranks:
            self._told = self._worth.ranks
            self._listener.judge(self._told.density)
        if self._used:
            self._listener.used(list(self._used.items()))
            self._used.clear()
