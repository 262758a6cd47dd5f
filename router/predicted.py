"""Which blocks will be where, because a request with them was just sent there. Pure, bounded, forgets by itself.

Events tell of blocks when they are computed; until then a second request with the same prefix (a burst of siblings)
would not be seen to belong there. Prompts are computed in the order in which they come, so for a request that lines
up behind, what the others there bring is as good as cached. An entry lasts until its request's prefill is over and
the events that tell of it have had time to come, or until the request ends.

Of a chain only those blocks need be remembered that events have not told of at that worker: `match` goes on from
there.

Always true: at most `most` blocks are remembered per worker; the oldest are forgotten first.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Final

EVENTS_S: Final = 2.0  # after the first token, by when events must have come
MOST: Final = 1 << 16  # blocks per worker


@dataclass(slots=True)
class _Worker:
    blocks: dict[int, int] = field(default_factory=dict)  # -> how many entries bring it
    entries: OrderedDict[str, Sequence[int]] = field(default_factory=OrderedDict)  # request -> its chain
    ending: deque[tuple[float, str]] = field(default_factory=deque)


class Predicted:
    """Beside the index of what events have told."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._workers: dict[str, _Worker] = {}

    def sent(self, request: str, worker: str, chain: Sequence[int]) -> None:
        """These blocks are going to be there: of a prompt those that were not known to be."""
        there = self._workers.get(worker)
        if there is None:
            there = self._workers[worker] = _Worker()
        self._drop(there, request)
        there.entries[request] = chain
        blocks = there.blocks
        for block in chain:
            blocks[block] = blocks.get(block, 0) + 1
        while len(blocks) > self._most:
            self._drop(there, next(iter(there.entries)))

    def prefilled(self, request: str, worker: str, now: float) -> None:
        """Events will have told by `EVENTS_S` from now."""
        there = self._workers.get(worker)
        if there is not None and request in there.entries:
            self._expire(there, now)
            there.ending.append((now + EVENTS_S, request))

    def ended(self, request: str, worker: str) -> None:
        """It was given up before its prefill was over."""
        there = self._workers.get(worker)
        if there is not None:
            self._drop(there, request)

    def forget(self, worker: str) -> None:
        """The worker has gone, or its cache was cleared."""
        self._workers.pop(worker, None)

    def match(self, worker: str, chain: Sequence[int], now: float, known: int = 0) -> int:
        """How many leading blocks will be there; `known` of them are, by events."""
        there = self._workers.get(worker)
        if there is None:
            return known
        if there.ending and there.ending[0][0] <= now:
            self._expire(there, now)
        blocks = there.blocks
        if len(chain) <= known or chain[known] not in blocks:
            return known
        return known + len(list(takewhile(blocks.__contains__, islice(chain, known, None))))

    def _expire(self, there: _Worker, now: float) -> None:
        while there.ending and there.ending[0][0] <= now:
            self._drop(there, there.ending.popleft()[1])

    @staticmethod
    def _drop(there: _Worker, request: str) -> None:
        for block in there.entries.pop(request, ()):
            left = there.blocks[block] - 1
            if left:
                there.blocks[block] = left
            else:
                del there.blocks[block]
