"""The sources of one node's stream: what was last said of each, and the numbers of its places. Pure.

Bounded: by MOST_SOURCES, and by what numbers the node may have. What finds no room has none of its blocks counted, and
makes the node `crowded`; a source of which some blocks found none is not exact.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from kvd import wire
from kvd.router.numbering import Numbering, Place

MOST_SOURCES: Final = 4096
NO_ROOM: Final = "its node told of more ranks, namespaces and media than one node may have"
_NOTHING: Mapping[str, int] = {}

Identity = tuple[str, int, str]


class Known(NamedTuple):
    """A source, and what its node does not know of it; "" where that is exact."""

    source: wire.Source
    why: str


class Sources:
    """`known` is everything that was said of; who reads it must not change it."""

    def __init__(self, holders: Numbering) -> None:
        self.known: dict[Identity, Known] = {}
        self.speeds: Sequence[wire.Speed] = ()  # of the node's tiers
        self.crowded = False  # a source or a place found no room: some of those that are here may be gone
        self._holders = holders
        self._numbers: dict[Identity, dict[str, int]] = {}  # of the holders, by medium
        self._refused: set[Identity] = set()  # sources with blocks in a medium that found no number

    def meet(self, source: wire.Source, why: str) -> Identity:
        """This is said of it now."""
        identity = (source.worker, source.rank, source.namespace)
        if not (source.worker or source.namespace):
            self.speeds = source.speeds
        elif identity in self.known or len(self.known) < MOST_SOURCES:
            self.known[identity] = Known(source, why or (NO_ROOM if identity in self._refused else ""))
        else:
            self.crowded = True
        return identity

    def number(self, node: str, identity: Identity, medium: str) -> int | None:
        """The holder's number; where there are too many, None, and the source is not exact."""
        if identity not in self.known:
            return None
        held = self._numbers.setdefault(identity, {})
        number = held.get(medium)
        if number is None:
            number = self._holders.number(Place(node, *identity, medium))
            if number is None:
                self.known[identity] = Known(self.known[identity].source, NO_ROOM)
                self._refused.add(identity)
                self.crowded = True
                return None
            held[medium] = number
        return number

    def held(self, identity: Identity) -> Mapping[str, int]:
        """The numbers of its holders, by medium."""
        return self._numbers.get(identity, _NOTHING)

    def numbers(self) -> Iterator[int]:
        """Of all holders."""
        for held in self._numbers.values():
            yield from held.values()

    def drop(self, node: str) -> None:
        """Forget them all, and their numbers: nothing may be held under those any more."""
        for identity, held in self._numbers.items():
            for medium in held:
                self._holders.forget(Place(node, *identity, medium))
        self._numbers.clear()
        self._refused.clear()
        self.known.clear()
        self.crowded = False
