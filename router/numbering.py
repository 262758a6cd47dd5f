"""Places where blocks lie, as the small numbers that the index knows them by. Pure.

A holder is one medium of one source (kvd.wire.stream): the GPU of a worker's rank, a node's RAM for one namespace.
Numbers are used again once their holder is gone, so they stay small. Bounded.
"""

from typing import NamedTuple

MOST_HOLDERS = 1 << 16


class Place(NamedTuple):
    """What identifies a holder. A source's other fields may change while it lives."""

    node: str
    worker: str
    rank: int
    namespace: str
    medium: str


class Numbering:
    """Numbers and places, both ways."""

    def __init__(self) -> None:
        self._numbers: dict[Place, int] = {}
        self._places: list[Place | None] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, place: Place) -> int | None:
        """The place's number, a new one where it has none; None when there are too many."""
        found = self._numbers.get(place)
        if found is None and len(self._numbers) < MOST_HOLDERS:
            found = self._free.pop() if self._free else len(self._places)
            if found == len(self._places):
                self._places.append(None)
            self._places[found] = place
            self._numbers[place] = found
        return found

    def place(self, number: int) -> Place | None:
        return self._places[number] if 0 <= number < len(self._places) else None

    def forget(self, place: Place) -> None:
        """Its number may become another's: nothing may be held under it any more. A no-op for what is not known."""
        number = self._numbers.pop(place, None)
        if number is not None:
            self._places[number] = None
            self._free.append(number)
