"""Who is served next when every worker is busy: priority first, then each tenant its share, then who came first. Pure.

Each tenant has a clock that runs 1/weight for every request served; the tenant whose clock is furthest behind is next.
One that comes back after a silence starts where service stands: it has saved up no credit, and one that sends a
thousand at once waits behind itself.
Always true: at most `most` wait; nobody is served after its deadline.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """One that waits."""

    item: T
    tenant: str
    weight: float
    priority: int
    deadline: float


@dataclass(slots=True)
class _Line(Generic[T]):
    """The tickets of one tenant in one priority, first come first."""

    weight: float
    clock: float
    tickets: OrderedDict[int, Ticket[T]] = field(default_factory=OrderedDict)

    @property
    def first(self) -> Ticket[T]:
        return next(iter(self.tickets.values()))

    @property
    def last(self) -> Ticket[T]:
        return next(reversed(self.tickets.values()))


class FairQueue(Generic[T]):
    """Tickets in the order they deserve."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._levels: dict[int, _Level[T]] = {}  # by priority
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: T, tenant: str, weight: float, priority: int, deadline: float) -> Ticket[T]:
        """Joins the end of its tenant's line. May make the queue longer than `most`: ask `surplus`."""
        ticket = Ticket(item, tenant, weight, priority, deadline)
        self._levels.setdefault(priority, _Level()).push(ticket)
        self._size += 1
        return ticket

    def surplus(self) -> Ticket[T] | None:
        """Takes out who must leave because the queue is too long: in the lowest priority the newest of whoever holds
        most for its weight, which may be the one that just came. None while there is room."""
        if self._size <= self.most:
            return None
        line = max(self._levels[min(self._levels)].waiting, key=lambda line: len(line.tickets) / line.weight)
        self.remove(ticket := line.last)
        return ticket

    def pop(self, now: float, may: Callable[[T], bool] = lambda _: True) -> Ticket[T] | None:
        """Takes out who is next of those that may; None when nobody does whose deadline is still to come."""
        for priority in sorted(self._levels, reverse=True):
            for line in sorted(self._levels[priority].waiting, key=lambda line: line.clock):
                for ticket in line.tickets.values():
                    if ticket.deadline > now and may(ticket.item):
                        self._levels[priority].served(line)
                        self.remove(ticket)
                        return ticket
        return None

    def expired(self, now: float) -> list[Ticket[T]]:
        """Takes out those whose deadline has come."""
        lines = [line for level in self._levels.values() for line in level.waiting]
        late = [ticket for line in lines for ticket in line.tickets.values() if ticket.deadline <= now]
        for ticket in late:
            self.remove(ticket)
        return late

    def remove(self, ticket: Ticket[T]) -> bool:
        """Takes this one out; False when it waits no longer."""
        level = self._levels.get(ticket.priority)
        if level is None or not level.remove(ticket):
            return False
        self._size -= 1
        if not level.waiting:
            del self._levels[ticket.priority]
        return True

    def faults(self) -> list[str]:
        """What is wrong with it; nothing."""
        held = sum(len(line.tickets) for level in self._levels.values() for line in level.waiting)
        return (
            [] if held == self._size <= self.most else [f"{held} tickets, {self._size} counted, {self.most} allowed"]
        )


class _Level(Generic[T]):
    """The lines of one priority."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._stands = 0.0  # the clock of who was served last

    @property
    def waiting(self) -> list[_Line[T]]:
        return [line for line in self._lines.values() if line.tickets]

    def push(self, ticket: Ticket[T]) -> None:
        line = self._lines.get(ticket.tenant)
        if line is None:
            line = self._lines[ticket.tenant] = _Line(ticket.weight, self._stands)
        if not line.tickets:
            line.clock = max(line.clock, self._stands)
        line.tickets[id(ticket)] = ticket

    def served(self, line: _Line[T]) -> None:
        # One that could not be served for a while, because its model was away, has saved up nothing either.
        self._stands = max(self._stands, line.clock)
        line.clock = self._stands + 1.0 / line.weight
        # Whose clock service has passed has nothing to be remembered for.
        gone = [name for name, line in self._lines.items() if not line.tickets and line.clock <= self._stands]
        for name in gone:
            del self._lines[name]

    def remove(self, ticket: Ticket[T]) -> bool:
        line = self._lines.get(ticket.tenant)
        return line is not None and line.tickets.pop(id(ticket), None) is not None
