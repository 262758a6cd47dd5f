"""Who leaves RAM next: the policy's queues over groups, one for each size class and tenant. Pure.

Always true: a group waits exactly while it is a leaf, is not pinned and has not been chosen to leave.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from kvd.daemon.group import Group, children
from kvd.storage.policy import Policy
from kvd.storage.worth import Worth

Line = tuple[int, str]  # size class and tenant


@dataclass(slots=True)
class Departures:
    """The order of all groups."""

    worth: Worth
    extent_of: Callable[[int], int]  # of a slot
    _policy: Policy = field(init=False)
    _groups: dict[int, Group] = field(default_factory=dict)  # by id, which is the policy's place
    _lines: dict[Line, list[int]] = field(default_factory=dict)  # its number as a queue of the policy, how many groups
    _free_queues: list[int] = field(default_factory=list)
    _pinned: Counter[int] = field(default_factory=Counter)  # slots of pinned pages, by extent

    def __post_init__(self) -> None:
        self._policy = Policy(self.worth)

    def enter(self, group: Group, kind: int, now: float) -> None:
        """It has become resident. `kind` as `Worth` gives it."""
        line = self._lines.get((group.size_class, group.owner))
        if line is None:
            line = [self._free_queues.pop() if self._free_queues else len(self._lines), 0]
            self._lines[group.size_class, group.owner] = line
        line[1] += 1
        self._groups[group.id] = group
        self._policy.enter(group.id, kind, now, line[0])
        self.offer(group, now)

    def leave(self, group: Group) -> None:
        """It is not resident any more."""
        self._policy.withdraw(group.id)
        del self._groups[group.id]
        if group.pins:
            self._pinned.subtract(map(self.extent_of, group.slots))
        line = self._lines[group.size_class, group.owner]
        line[1] -= 1
        if not line[1]:
            self._free_queues.append(line[0])
            del self._lines[group.size_class, group.owner]

    def offer(self, group: Group, now: float) -> None:
        """It may have become a leaf."""
        if group.waits:
            self._policy.offer(group.id, now)

    def withdraw(self, group: Group) -> None:
        """It has a child now."""
        self._policy.withdraw(group.id)

    def use(self, group: Group, kind: int, now: float) -> None:
        """A worker read or asked for the page, which is of this kind from now on."""
        self._policy.use(group.id, kind, now)

    def pin(self, group: Group) -> None:
        """It stays, and with it all before it, until it is unpinned as often."""
        if not group.pins:
            self._pinned.update(map(self.extent_of, group.slots))
        group.pins += 1
        self._policy.withdraw(group.id)

    def unpin(self, group: Group, now: float) -> None:
        group.pins -= 1
        if not group.pins:
            self._pinned.subtract(map(self.extent_of, group.slots))
        self.offer(group, now)

    def keeps(self, extent: int) -> bool:
        """A page in it is pinned: it cannot be emptied."""
        return self._pinned[extent] > 0

    def hand_over(self, group: Group, owner: str, now: float) -> None:
        """It turned out whose page it is."""
        kind = self._policy.kind(group.id)
        self.leave(group)
        group.owner = owner
        self.enter(group, kind, now)
        if group.pins:
            self._pinned.update(map(self.extent_of, group.slots))

    # -- what they are worth --------------------------------------------------------------------------------

    def kind(self, group: Group) -> int:
        return self._policy.kind(group.id)

    def density(self, group: Group, now: float) -> float:
        """Expected uses per second of residence."""
        return self._policy.density(group.id, now)

    def lowest(self, line: Line) -> float:
        """The density of the next victim of this size class and tenant; infinite where nobody waits."""
        return self._policy.lowest(self._lines[line][0])

    def offers(self) -> dict[Line, float]:
        """The same for all that have one."""
        lowest = {line: self.lowest(line) for line in self._lines}
        return {line: density for line, density in lowest.items() if density < inf}

    # -- who leaves -----------------------------------------------------------------------------------------

    def peek(self, line: Line, now: float) -> Group | None:
        """The least dense leaf that nobody holds, or None. It stays where it is."""
        for place in self._policy.victims(1, now, self._idle, queue=self._lines[line][0]):
            self._policy.offer(place, now)
            return self._groups[place]
        return None

    def victim(self, line: Line, now: float) -> Group | None:
        """The same, marked as leaving. Then it leaves, or `spare` it.

        May be called again before that: victims leave in the order in which they were chosen.
        """
        found = self._policy.victims(1, now, self._idle, queue=self._lines[line][0])
        group = self._groups[found[0]] if found else None
        if group is not None:
            group.leaving = True
            parent = group.parent
            if parent is not None and not parent.pins and all(child.leaving for child in children(parent)):
                self._policy.offer(parent.id, now)  # a leaf once these are gone
        return group

    def _idle(self, place: int) -> bool:
        return not self._groups[place].held

    def spare(self, group: Group, now: float) -> None:
        """A victim turned out to be held: somebody looked it up, which is a use."""
        group.leaving = False
        group.last_use = now
        self._policy.use(group.id, self._policy.kind(group.id), now)
        self.offer(group, now)
        if group.parent is not None:
            self._policy.withdraw(group.parent.id)

    def fault(self, group: Group) -> str | None:
        """What is wrong with where it waits, in words."""
        if self._policy.offered(group.id) == group.waits:
            return None
        return f"group {group.id} {'does not wait' if group.waits else 'waits'} to leave"
