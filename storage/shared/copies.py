"""Which file a page is in, as far as this node has read them. Pure.

A page may lie in several files: two nodes stored it at once, or a compaction moved it and the old file is still there.
The copy in the youngest file counts, for every node alike; the others are dead weight, and stand in when it goes.
So no two nodes can each drop their copy for the sake of the other's.

Dead are copies in a *grave* (removed up to some stamp), copies past their time, and those a younger one replaces.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

from kvd.storage.shared.sealed import MAX_ROWS, Row, Rows
from kvd.storage.tier import Name

_ROW_BITS: Final = 20
_PIECE: Final = 4096

assert MAX_ROWS <= 1 << _ROW_BITS


@dataclass(slots=True)
class SealedFile:
    """A file and what of it counts."""

    path: str
    stamp: int  # when it was made
    size: int
    rows: Rows
    tenant: str = ""  # whose share it counts against; "" for nobody's
    number: int = -1
    payload_bytes: int = 0
    live_rows: int = 0
    live_bytes: int = 0
    oldest: int = 0  # no row is older
    newest: int = 0  # put, not moved: what compaction writes stays as old as its pages

    @property
    def age_order(self) -> tuple[int, str]:
        return self.newest, self.path

    @property
    def rank(self) -> tuple[int, str]:
        return self.stamp, self.path


def needed(graves: Mapping[Name, int], files: Iterable[SealedFile]) -> dict[Name, str]:
    """Those graves without which a copy would count again, and the file that has one. Reads every index: seldom."""
    found: dict[Name, str] = {}
    for file in files:
        for name, stamp in file.rows.stamps():
            if stamp <= graves.get(name, -1):
                found[name] = file.path
    return found


class Place(NamedTuple):
    file: SealedFile
    number: int  # of the row

    @property
    def row(self) -> Row:
        return self.file.rows[self.number]


@dataclass(slots=True)
class Copies:
    """Every method that makes pages come or go returns their names."""

    files: dict[str, SealedFile] = field(default_factory=dict)
    graves: dict[Name, int] = field(default_factory=dict)  # copies up to this stamp are dead
    _cutoff: int = -1  # copies up to this stamp are past their time
    _first: dict[Name, int] = field(default_factory=dict)  # file number << 20 | row
    _others: dict[Name, list[int]] = field(default_factory=dict)
    _numbered: dict[int, SealedFile] = field(default_factory=dict)
    _next: int = 0

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, name: Name) -> bool:
        return name in self._first

    def place(self, name: Name) -> Place | None:
        at = self._first.get(name)
        return None if at is None else self._place(at)

    def names(self) -> Iterator[list[Name]]:
        """As they are now, in pieces."""
        remaining = iter(list(self._first))
        while piece := list(islice(remaining, _PIECE)):
            yield piece

    def live(self, file: SealedFile) -> list[Row]:
        """The rows that count."""
        stamps = enumerate(file.rows.stamps())
        return [file.rows[i] for i, (name, _) in stamps if self._first.get(name) == self._at(file, i)]

    def add(self, file: SealedFile) -> list[Name]:
        assert file.path not in self.files, "a file is added once"
        file.number, self._next = self._next, self._next + 1
        file.payload_bytes = sum(map(file.rows.payload_bytes, range(len(file.rows))))
        self.files[file.path] = self._numbered[file.number] = file
        came: list[Name] = []
        for i, (name, stamp) in enumerate(file.rows.stamps()):
            if stamp <= self._cutoff or stamp <= self.graves.get(name, -1):
                continue
            at, known = self._at(file, i), self._first.get(name)
            if known is None:
                came.append(name)
                self._lead(name, at)
            elif self._rank(known) < self._rank(at):
                self._others.setdefault(name, []).append(known)
                self._count(known, -1)
                self._lead(name, at)
            else:
                self._others.setdefault(name, []).append(at)
        stamps = [stamp for _, stamp in file.rows.stamps()]
        file.oldest, file.newest = min(stamps, default=0), max(stamps, default=0)
        return came

    def withdraw(self, path: str) -> list[Name]:
        """Forget a file."""
        file = self.files.pop(path)
        gone = [name for i, (name, _) in enumerate(file.rows.stamps()) if self._drop(name, self._at(file, i))]
        del self._numbered[file.number]
        return gone

    def bury(self, graves: Iterable[tuple[Name, int]]) -> list[Name]:
        """Pages removed, each up to a stamp."""
        gone: list[Name] = []
        for name, stamp in graves:
            if stamp <= self.graves.get(name, -1):
                continue
            self.graves[name] = stamp
            held = [at for at in self._all(name) if self._place(at).row.stamp <= stamp]
            gone += [name for at in held if self._drop(name, at)]
        return gone

    def expire(self, cutoff: int) -> list[Name]:
        """Drop copies up to this stamp."""
        self._cutoff = cutoff  # also an earlier one: the clock may have been set back
        gone: list[Name] = []
        for file in self.files.values():
            if file.oldest > cutoff:
                continue
            left = [stamp for _, stamp in file.rows.stamps() if stamp > cutoff]
            file.oldest = min(left, default=1 << 63)
            for i, (name, stamp) in enumerate(file.rows.stamps()):
                if stamp <= cutoff and self._drop(name, self._at(file, i)):
                    gone.append(name)
        return gone

    def check(self) -> list[str]:
        """Broken invariants, in words."""
        found: list[str] = []
        count: dict[int, tuple[int, int]] = {}
        for name, at in self._first.items():
            file, row = self._place(at)
            rows, size = count.get(file.number, (0, 0))
            count[file.number] = rows + 1, size + file.rows.payload_bytes(row)
            if file.rows[row].page.name != name:
                found.append(f"{name.hex()} is not in row {row} of {file.path}")
            if any(self._rank(other) > self._rank(at) for other in self._others.get(name, [])):
                found.append(f"{name.hex()} has a younger copy than the one that counts")
        for file in self.files.values():
            if count.get(file.number, (0, 0)) != (file.live_rows, file.live_bytes):
                found.append(f"{file.path} counts {file.live_rows} rows, {file.live_bytes} bytes")
        return found

    def _drop(self, name: Name, at: int) -> bool:
        """One copy goes; True when it was the last."""
        others = self._others.get(name, [])
        if self._first.get(name) != at:
            if at in others:
                others.remove(at)
                self._tidy(name, others)
            return False
        self._count(at, -1)
        if not others:
            del self._first[name]
            return True
        best = max(others, key=self._rank)
        others.remove(best)
        self._tidy(name, others)
        self._lead(name, best)
        return False

    def _tidy(self, name: Name, others: list[int]) -> None:
        if not others:
            del self._others[name]

    def _lead(self, name: Name, at: int) -> None:
        self._first[name] = at
        self._count(at, +1)

    def _count(self, at: int, sign: int) -> None:
        file, row = self._place(at)
        file.live_rows += sign
        file.live_bytes += sign * file.rows.payload_bytes(row)

    def _all(self, name: Name) -> list[int]:
        first = self._first.get(name)
        # The one that counts goes last: otherwise each of the others would have to take its place.
        return [] if first is None else [*self._others.get(name, []), first]

    def _place(self, at: int) -> Place:
        return Place(self._numbered[at >> _ROW_BITS], at & (MAX_ROWS - 1))

    def _rank(self, at: int) -> tuple[int, str]:
        return self._numbered[at >> _ROW_BITS].rank

    def _at(self, file: SealedFile, row: int) -> int:
        return file.number << _ROW_BITS | row
