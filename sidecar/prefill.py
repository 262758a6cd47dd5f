"""How fast does this worker compute? Seen from the plugin: a lookup missed pages, later they are stored. Pure.

What lies between the two is the prefill, and waiting in queues. Waiting only makes it look slower, so the fastest of
the recent observations is believed. kvd compares it with its disk, see kvd.daemon.gate.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

_OPEN = 256  # lookups whose pages have not been stored yet
_RECENT = 32


@dataclass(slots=True)
class PrefillRate:
    """Thread-safe as far as dictionaries are: an observation may get lost, no more."""

    _missed: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)
    _seen: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def missed(self, key: str, pages: int, now: float) -> None:
        """A lookup found nothing from this key on; `pages` are to be computed."""
        self._missed[key] = (now, pages)
        if len(self._missed) > _OPEN:
            self._missed.popitem(last=False)

    def computed(self, key: str, page_tokens: int, now: float) -> None:
        """Pages from this key on are being stored."""
        since, pages = self._missed.pop(key, (now, 0))
        if pages and now > since:
            self._seen.append(pages * page_tokens / (now - since))

    @property
    def tokens_per_s(self) -> float:
        """0.0 when nothing was seen yet."""
        return max(self._seen, default=0.0)
