"""What came and left since the caller last asked. Pure.

Always true: the caller's picture, changed by what is reported next, is what is there. So a page that left and came
back is no news, and what the caller stores or removes itself takes back what it was not told yet.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvd.storage.tier import Name, News


@dataclass(slots=True)
class Changes:
    _came: dict[Name, None] = field(default_factory=dict)
    _left: dict[Name, None] = field(default_factory=dict)

    def came(self, names: Iterable[Name]) -> None:
        for name in names:
            if name in self._left:
                del self._left[name]
            else:
                self._came[name] = None

    def left(self, names: Iterable[Name]) -> None:
        for name in names:
            if name in self._came:
                del self._came[name]
            else:
                self._left[name] = None

    def knows(self, names: Iterable[Name]) -> None:
        """The caller has just stored or removed these."""
        for name in names:
            self._came.pop(name, None)
            self._left.pop(name, None)

    def take(self) -> News:
        found = News(list(self._came), list(self._left))
        self._came.clear()
        self._left.clear()
        return found
