"""Which page leaves a full tier next. Pure: time is a number, a page is the number of its place.

Pages that may leave wait in lines, one per kind and age; a line's rank is what `worth` has learnt of it. The victim is
the oldest page of the lowest line. A *queue* has lines of its own: pages of one size and tenant.

Chains are the caller's: it offers leaves only, and offers a parent when its last child has gone.

Always true: an offered page stands in exactly one line; only offered pages become victims; the same calls give the
same victims on every machine.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from kvd.storage.reuse import AGES, age_of
from kvd.storage.worth import Ranks, Worth

_WALK_EVERY = 256  # choices between two walks that move pages on to the lines of their age
# Pages moved at a time, per line or choice: an hour without choices must not be made up for in one of them. Who is
# not moved yet is judged by the age it had.
_MOVES = 256
_NOWHERE = -1
_FEWEST = 1024  # places


def everything(place: int) -> bool:
    """Any page may be chosen."""
    return True


@dataclass(slots=True)
class _Queue:
    """Who is first and last in each line where somebody waits."""

    ranks: Ranks  # the lesson that `waiting` is in terms of
    head: dict[int, int] = field(default_factory=dict)
    tail: dict[int, int] = field(default_factory=dict)
    waiting: int = 0  # bit r: somebody waits in the line of rank r
    choices: int = 0


class Policy:
    """The order in which the pages of one tier leave it."""

    def __init__(self, worth: Worth) -> None:
        self._worth = worth
        self._queues: list[_Queue] = []
        self._queue = array("i")  # by place, as all that follow
        self._kind = array("B")
        self._at = array("d")  # when last used
        self._line = array("h")
        self._next = array("i")
        self._previous = array("i")

    # -- what happens to pages ----------------------------------------------------------------------------

    def enter(self, place: int, kind: int, now: float, queue: int = 0) -> None:
        """A page of this kind lies there now. It is not offered yet."""
        while place >= len(self._line):
            self._grow(max(_FEWEST, len(self._line)))
        while queue >= len(self._queues):
            self._queues.append(_Queue(self._worth.ranks))
        self.withdraw(place)
        self._queue[place] = queue
        self._kind[place] = kind
        self._at[place] = now

    def use(self, place: int, kind: int, now: float) -> None:
        """A page was used, and is of this kind now."""
        offered = self.offered(place)
        self.withdraw(place)
        self._kind[place] = kind
        self._at[place] = now
        if offered:
            self.offer(place, now)

    def kind(self, place: int) -> int:
        return self._kind[place]

    def density(self, place: int, now: float) -> float:
        """What the page is worth now, offered or not."""
        return self._worth.density(self._kind[place], age_of(now - self._at[place]))

    def offered(self, place: int) -> bool:
        return self._line[place] != _NOWHERE

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
        queue = self._queues[self._queue[place]]
        before, after = self._previous[place], self._next[place]
        self._line[place] = _NOWHERE
        if before == after == _NOWHERE:
            del queue.head[line], queue.tail[line]
            queue.waiting &= ~(1 << queue.ranks.rank[line])
            return
        if before == _NOWHERE:
            queue.head[line] = after
        else:
            self._next[before] = after
        if after == _NOWHERE:
            queue.tail[line] = before
        else:
            self._previous[after] = before

    # -- who leaves ---------------------------------------------------------------------------------------

    def victims(
        self, want: int, now: float, allowed: Callable[[int], bool] = everything, below: float = inf,
        queue: int = 0,
    ) -> list[int]:  # fmt: skip
        """Up to `want` offered pages of a queue, least dense first, none denser than `below`. They are withdrawn.

        Pages that are not `allowed` are walked past each time: withdraw those that stay disallowed for long.
        """
        mine = self._current(queue)
        mine.choices += 1
        if mine.choices % _WALK_EVERY == 0:
            self._walk(mine, now)
        chosen: list[int] = []
        waiting, moves = mine.waiting, _MOVES
        while waiting and len(chosen) < want:
            lowest = waiting & -waiting
            line = mine.ranks.by_rank[lowest.bit_length() - 1]
            if moved := self._move_on(mine, line, now, moves):
                waiting, moves = mine.waiting, moves - moved
                continue
            if mine.ranks.density[line] > below:
                break
            waiting &= ~lowest
            place = mine.head[line]
            while place != _NOWHERE and len(chosen) < want:
                after = self._next[place]
                if allowed(place):
                    self.withdraw(place)
                    chosen.append(place)
                place = after
        return chosen

    def lowest(self, queue: int = 0) -> float:
        """The density of the queue's next victim; infinite when nobody is offered."""
        mine = self._current(queue)
        if not mine.waiting:
            return inf
        return mine.ranks.density[mine.ranks.by_rank[(mine.waiting & -mine.waiting).bit_length() - 1]]

    def check(self) -> None:
        """Raise when a line is broken."""
        found = 0
        for number, queue in enumerate(self._queues):
            waiting = sum(1 << queue.ranks.rank[line] for line in queue.head)
            assert waiting == queue.waiting, "a line is marked wrongly"
            assert queue.head.keys() == queue.tail.keys(), "a line has one end"
            for line, head in queue.head.items():
                place, before = head, _NOWHERE
                while place != _NOWHERE:
                    assert self._line[place] == line, f"page {place} stands in two lines"
                    assert self._queue[place] == number, f"page {place} stands in two queues"
                    assert self._previous[place] == before, f"page {place} does not know who is before it"
                    place, before, found = self._next[place], place, found + 1
                assert queue.tail[line] == before, f"line {line} has lost its end"
        assert found == sum(line != _NOWHERE for line in self._line), "an offered page stands in no line"

    # -- lines --------------------------------------------------------------------------------------------

    def _join(self, place: int, line: int) -> None:
        """At the end of the line, or at its front where it has waited longer than the first one there."""
        queue = self._queues[self._queue[place]]
        head = queue.head.get(line, _NOWHERE)
        self._line[place] = line
        if head == _NOWHERE:
            queue.head[line] = queue.tail[line] = place
            self._next[place] = self._previous[place] = _NOWHERE
            queue.waiting |= 1 << queue.ranks.rank[line]
        elif self._at[place] <= self._at[head]:
            self._next[place], self._previous[place] = head, _NOWHERE
            self._previous[head] = queue.head[line] = place
        else:
            tail = queue.tail[line]
            self._next[place], self._previous[place] = _NOWHERE, tail
            self._next[tail] = queue.tail[line] = place

    def _move_on(self, queue: _Queue, line: int, now: float, most: int) -> int:
        """Move up to so many at the front who have outgrown the line's age; how many there were."""
        kind, age = divmod(line, AGES)
        moved = 0
        while moved < most and (place := queue.head.get(line, _NOWHERE)) != _NOWHERE:
            older = age_of(now - self._at[place])
            if older <= age:
                break
            self.withdraw(place)
            self._join(place, kind * AGES + older)
            moved += 1
        return moved

    def _walk(self, queue: _Queue, now: float) -> None:
        for line in list(queue.head):
            self._move_on(queue, line, now, _MOVES)

    def _current(self, number: int) -> _Queue:
        """The queue, by what has been learnt until now."""
        while number >= len(self._queues):
            self._queues.append(_Queue(self._worth.ranks))
        queue = self._queues[number]
        if queue.ranks is not self._worth.ranks:
            queue.ranks = self._worth.ranks
            queue.waiting = sum(1 << queue.ranks.rank[line] for line in queue.head)
        return queue

    def _grow(self, more: int) -> None:
        self._kind.frombytes(bytes(more))
        self._at.frombytes(bytes(8 * more))
        self._queue.frombytes(bytes(4 * more))
        for links in (self._line, self._next, self._previous):
            links.extend([_NOWHERE] * more)
