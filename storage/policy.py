"""Which page leaves a full tier. Pure: time is a number, a page is the number of its place and a hashed key.

Pages that may leave wait in lines, one per kind and age; a line's rank is the density that `reuse` has learnt for it
(expected uses per second of residence). The victim is the oldest page of the lowest line. A new page that is worth
less than all of them is not taken in: so one-off pages do not wash out what is reused.

Chains are the caller's: it offers leaves only, and offers a parent when its last child has gone.

Always true: an offered page stands in exactly one line; only offered pages become victims; the same calls give the
same victims on every machine.
"""

from array import array
from collections.abc import Callable

from kvd.storage.reuse import AGES, Reuse, age_of
from kvd.storage.sketch import MOST, Sketch

_TRAITS = 40
KINDS = (MOST + 1) * _TRAITS
_LEARN_EVERY = 4096  # uses between two lessons
_WALK_EVERY = 256  # choices between two walks that move pages on to the lines of their age
# Pages moved at a time, per line or choice: an hour without choices must not be made up for in one of them. Who is
# not moved yet is judged by the age it had.
_MOVES = 256
_NOWHERE = -1


def trait(depth: int, fresh: int, last: bool) -> int:
    """What a request tells about one of its pages.

    `depth`: pages before it in its chain. `fresh`: how many pages of the request had never been seen: few where a
    conversation goes on. `last`: it ends the request, and may be only partly filled.
    """
    steps = (depth > 0) + (depth > 3) + (depth > 15) + (depth > 47)
    news = (fresh > 2) + (fresh > 7) + (fresh > 31)
    return (steps * 4 + news) * 2 + last


def everything(place: int) -> bool:
    """Any page may be chosen."""
    return True


class Policy:
    """The order in which the pages of one tier and one size leave it."""

    def __init__(self, places: int) -> None:
        self.reuse = Reuse(KINDS)
        self._sketch = Sketch(places)
        self._uses = 0
        self._choices = 0
        self._kind = array("B", bytes(places))
        self._at = array("d", bytes(8 * places))  # when last used
        self._line = array("h", [_NOWHERE]) * places
        self._next = array("i", [_NOWHERE]) * places
        self._previous = array("i", [_NOWHERE]) * places
        self._head = array("i", [_NOWHERE]) * (KINDS * AGES)
        self._tail = array("i", [_NOWHERE]) * (KINDS * AGES)
        self._by_rank = list(range(KINDS * AGES))  # lines, lowest density first
        self._rank = list(range(KINDS * AGES))
        self._waiting = 0  # bit r: somebody waits in the line of rank r
        self._sort()

    # -- what happens to pages ----------------------------------------------------------------------------

    def seen(self, key: int) -> bool:
        """Whether the page was used lately, resident or not. Wrongly true for a few keys in a hundred."""
        return self._sketch.count(key) > 0

    def use(self, place: int | None, key: int, of: int, now: float) -> int:
        """A page was used, or wanted and missing (`place` is None). `of` is its `trait`. Returns its kind."""
        kind = self._sketch.add(key) * _TRAITS + of
        self.reuse.used(key, kind, now)
        self._uses += 1
        if self._uses % _LEARN_EVERY == 0:
            self.reuse.learn(now)
            self._sort()
        if place is not None:
            offered = self._line[place] != _NOWHERE
            self.enter(place, kind, now)
            if offered:
                self.offer(place, now)
        return kind

    def enter(self, place: int, kind: int, now: float) -> None:
        """A page of this kind lies there now. It is not offered yet."""
        self.withdraw(place)
        self._kind[place] = kind
        self._at[place] = now

    def offer(self, place: int, now: float) -> None:
        """The page may leave: it has become a leaf, or nobody holds it any more."""
        if self._line[place] == _NOWHERE:
            age = age_of(now - self._at[place])
            self._join(place, self._kind[place] * AGES + age)

    def withdraw(self, place: int) -> None:
        """The page must not leave: it has a child, is leased or pinned, or has gone already."""
        line = self._line[place]
        if line == _NOWHERE:
            return
        before, after = self._previous[place], self._next[place]
        if before == _NOWHERE:
            self._head[line] = after
        else:
            self._next[before] = after
        if after == _NOWHERE:
            self._tail[line] = before
        else:
            self._previous[after] = before
        self._line[place] = _NOWHERE
        if self._head[line] == _NOWHERE:
            self._waiting &= ~(1 << self._rank[line])

    # -- who leaves ---------------------------------------------------------------------------------------

    def worth(self, kind: int) -> float:
        """The density of a page of this kind that has just been used."""
        return self.reuse.density[kind][0]

    def victims(
        self, want: int, now: float, allowed: Callable[[int], bool] = everything, below: float = float("inf")
    ) -> list[int]:
        """Up to `want` offered pages, least dense first, none denser than `below`. They are withdrawn.

        Pages that are not `allowed` are walked past each time: withdraw those that stay disallowed for long.
        """
        self._choices += 1
        if self._choices % _WALK_EVERY == 0:
            self._walk(now)
        chosen: list[int] = []
        waiting, moves = self._waiting, _MOVES
        while waiting and len(chosen) < want:
            lowest = waiting & -waiting
            line = self._by_rank[lowest.bit_length() - 1]
            if self.reuse.density[line // AGES][line % AGES] > below:
                break
            if moved := self._move_on(line, now, moves):
                waiting, moves = self._waiting, moves - moved
                continue
            waiting &= ~lowest
            place = self._head[line]
            while place != _NOWHERE and len(chosen) < want:
                after = self._next[place]
                if allowed(place):
                    self.withdraw(place)
                    chosen.append(place)
                place = after
        return chosen

    def lowest(self) -> float | None:
        """The density of the next victim, to compare tiers' sizes of pages; None when nobody is offered."""
        if not self._waiting:
            return None
        line = self._by_rank[(self._waiting & -self._waiting).bit_length() - 1]
        return self.reuse.density[line // AGES][line % AGES]

    def check(self) -> None:
        """Raise when a line is broken."""
        found = 0
        for line, head in enumerate(self._head):
            assert (head != _NOWHERE) == bool(self._waiting >> self._rank[line] & 1), f"line {line} is marked wrongly"
            place, before = head, _NOWHERE
            while place != _NOWHERE:
                assert self._line[place] == line, f"page {place} stands in two lines"
                assert self._previous[place] == before, f"page {place} does not know who is before it"
                place, before, found = self._next[place], place, found + 1
            assert self._tail[line] == before, f"line {line} has lost its end"
        assert found == sum(line != _NOWHERE for line in self._line), "an offered page stands in no line"

    # -- lines --------------------------------------------------------------------------------------------

    def _join(self, place: int, line: int) -> None:
        """At the end of the line, or at its front where it has waited longer than the first one there."""
        head = self._head[line]
        self._line[place] = line
        if head == _NOWHERE:
            self._head[line] = self._tail[line] = place
            self._next[place] = self._previous[place] = _NOWHERE
            self._waiting |= 1 << self._rank[line]
        elif self._at[place] <= self._at[head]:
            self._next[place], self._previous[place] = head, _NOWHERE
            self._previous[head] = self._head[line] = place
        else:
            tail = self._tail[line]
            self._next[place], self._previous[place] = _NOWHERE, tail
            self._next[tail] = self._tail[line] = place

    def _move_on(self, line: int, now: float, most: int) -> int:
        """Move up to so many at the front who have outgrown the line's age; how many there were."""
        kind, age = divmod(line, AGES)
        moved = 0
        while moved < most and (place := self._head[line]) != _NOWHERE:
            older = age_of(now - self._at[place])
            if older <= age:
                break
            self.withdraw(place)
            self._join(place, kind * AGES + older)
            moved += 1
        return moved

    def _walk(self, now: float) -> None:
        waiting = self._waiting
        while waiting:
            lowest = waiting & -waiting
            waiting &= ~lowest
            self._move_on(self._by_rank[lowest.bit_length() - 1], now, _MOVES)

    def _sort(self) -> None:
        """Rank the lines by what has been learnt; among equals the older age leaves first."""
        density = [value for ages in self.reuse.density for value in ages]
        self._by_rank.sort(key=lambda line: (density[line], -(line % AGES), line))
        self._waiting = 0
        for rank, line in enumerate(self._by_rank):
            self._rank[line] = rank
            if self._head[line] != _NOWHERE:
                self._waiting |= 1 << rank
