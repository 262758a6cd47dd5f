"""Published policies to compare with, over equal blocks. Pure; each `ask` says whether the block was there.

LRU; Belady's optimum, which may also refuse a block; S3-FIFO (Yang and others, SOSP 2023); ARC (Megiddo and Modha,
FAST 2003); W-TinyLFU (Einziger and others, 2017) with a window of one per cent and exact counts.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence

_Line = OrderedDict[int, None]


def belady(blocks: Sequence[int], capacity: int) -> int:
    """Hits of the policy that knows the future and keeps what is asked for soonest."""
    never = len(blocks)
    upcoming = [never] * len(blocks)
    later: dict[int, int] = {}
    for at in range(len(blocks) - 1, -1, -1):
        upcoming[at] = later.get(blocks[at], never)
        later[blocks[at]] = at
    resident: dict[int, int] = {}  # block -> when it is asked for next
    farthest: list[tuple[int, int]] = []  # a heap; entries that `resident` does not confirm are stale
    hits = 0
    for at, block in enumerate(blocks):
        hits += resident.pop(block, None) is not None
        if upcoming[at] == never:
            continue
        resident[block] = upcoming[at]
        heapq.heappush(farthest, (-upcoming[at], block))
        while len(resident) > capacity:
            when, candidate = heapq.heappop(farthest)
            if resident.get(candidate) == -when:
                del resident[candidate]
    return hits


class Lru:
    """The least recently used block leaves."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._line: _Line = OrderedDict()

    def ask(self, block: int) -> bool:
        if block in self._line:
            self._line.move_to_end(block)
            return True
        if len(self._line) >= self._capacity:
            self._line.popitem(last=False)
        self._line[block] = None
        return False


class S3Fifo:
    """A small queue for newcomers, a main queue with second chances, and ghosts of who left the small one."""

    def __init__(self, capacity: int) -> None:
        self._small_room = max(1, capacity // 10)
        self._capacity = capacity
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._uses: dict[int, int] = {}  # of resident blocks, up to 3
        self._ghosts: _Line = OrderedDict()

    def ask(self, block: int) -> bool:
        if block in self._uses:
            self._uses[block] = min(3, self._uses[block] + 1)
            return True
        while len(self._uses) >= self._capacity:
            self._evict()
        if block in self._ghosts:
            del self._ghosts[block]
            self._main.append(block)
        else:
            self._small.append(block)
        self._uses[block] = 0
        return False

    def _evict(self) -> None:
        if self._small and (len(self._small) >= self._small_room or not self._main):
            block = self._small.popleft()
            if self._uses[block] > 1:
                self._uses[block] = 0
                self._main.append(block)
            else:
                del self._uses[block]
                self._ghosts[block] = None
                if len(self._ghosts) > self._capacity:
                    self._ghosts.popitem(last=False)
            return
        block = self._main.popleft()
        if self._uses[block]:
            self._uses[block] -= 1
            self._main.append(block)
        else:
            del self._uses[block]


class Arc:
    """Recency and frequency share the room; ghosts of both move the border."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._border = 0.0  # how much of the room recency should have
        self._once: _Line = OrderedDict()
        self._often: _Line = OrderedDict()
        self._once_ghosts: _Line = OrderedDict()
        self._often_ghosts: _Line = OrderedDict()

    def ask(self, block: int) -> bool:
        for line in (self._once, self._often):
            if block in line:
                del line[block]
                self._often[block] = None
                return True
        once, often = len(self._once_ghosts), len(self._often_ghosts)
        if block in self._once_ghosts:
            self._border = min(self._capacity, self._border + max(1.0, often / once))
            self._make_room(from_often=False)
            del self._once_ghosts[block]
            self._often[block] = None
            return False
        if block in self._often_ghosts:
            self._border = max(0.0, self._border - max(1.0, once / often))
            self._make_room(from_often=True)
            del self._often_ghosts[block]
            self._often[block] = None
            return False
        if len(self._once) + once == self._capacity:
            if once:
                self._once_ghosts.popitem(last=False)
                self._make_room(from_often=False)
            else:
                self._once.popitem(last=False)
        else:
            total = len(self._once) + len(self._often) + once + often
            if total >= 2 * self._capacity:
                self._often_ghosts.popitem(last=False)
            self._make_room(from_often=False)
        self._once[block] = None
        return False

    def _make_room(self, from_often: bool) -> None:
        if len(self._once) + len(self._often) < self._capacity:
            return
        size = len(self._once)
        if size and (size > self._border or (from_often and size == self._border) or not self._often):
            self._once_ghosts[self._once.popitem(last=False)[0]] = None
        else:
            self._often_ghosts[self._often.popitem(last=False)[0]] = None


class TinyLfu:
    """A window of newcomers; who leaves it enters the main part only if used more often than that part's victim."""

    def __init__(self, capacity: int) -> None:
        self._window_room = max(1, capacity // 100)
        self._main_room = max(1, capacity - self._window_room)
        self._protected_room = self._main_room * 4 // 5
        self._period = 10 * capacity  # asks, after which all counts are halved
        self._window: _Line = OrderedDict()
        self._probation: _Line = OrderedDict()
        self._protected: _Line = OrderedDict()
        self._counts: dict[int, int] = {}
        self._asks = 0

    def ask(self, block: int) -> bool:
        self._counts[block] = min(15, self._counts.get(block, 0) + 1)
        self._asks += 1
        if self._asks % self._period == 0:
            self._counts = {key: count // 2 for key, count in self._counts.items() if count > 1}
        if block in self._window:
            self._window.move_to_end(block)
        elif block in self._protected:
            self._protected.move_to_end(block)
        elif block in self._probation:
            del self._probation[block]
            self._protected[block] = None
            if len(self._protected) > self._protected_room:
                self._probation[self._protected.popitem(last=False)[0]] = None
        else:
            self._window[block] = None
            if len(self._window) > self._window_room:
                self._apply(self._window.popitem(last=False)[0])
            return False
        return True

    def _apply(self, candidate: int) -> None:
        if len(self._probation) + len(self._protected) >= self._main_room:
            line = self._probation or self._protected
            victim = next(iter(line))
            if self._counts.get(candidate, 0) <= self._counts.get(victim, 0):
                return
            del line[victim]
        self._probation[candidate] = None
