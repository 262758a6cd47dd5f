"""Pages leave all lower tiers because an operator says so, and RAM again if they came up meanwhile.

One removal at a time. On the event loop's thread; what a tier answers comes later.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

from kvd import wire
from kvd.daemon.below import Below
from kvd.daemon.eviction import Selection, evict_names
from kvd.daemon.node import Node
from kvd.errors import Refused
from kvd.storage.tier import Name


class Removals:
    """A tier that does not work, or dies meanwhile, is an answer too."""

    def __init__(self, node: Node, lower: Sequence[Below]) -> None:
        self._node = node
        self._lower = lower
        self._busy = False

    def begin(self, request: wire.RemoveBelow, respond: Callable[[wire.RemovedBelow], None]) -> None:
        """`respond` comes once, perhaps at once. Raises PeerError, or Refused while another one is under way."""
        which = Selection.of(request)
        if self._busy:
            raise Refused("another eviction is under way", "try again when it is done")
        self._busy = True
        removed = dict.fromkeys((below.name for below in self._lower), 0)
        troubles: dict[str, str] = {}

        def ended(name: str, trouble: str) -> None:
            troubles[name] = trouble
            if len(troubles) == len(removed):
                self._busy = False
                respond(wire.RemovedBelow([wire.TierRemoval(n, removed[n], troubles[n]) for n in removed]))

        def left(name: str, bit: int, names: list[Name]) -> None:
            removed[name] += len(names)
            self._node.stock.below_changed(bit, [], names)
            evict_names(self._node.stock, self._node.sessions, names, time.monotonic())

        for below, tier in zip(self._lower, self._node.promotion.tiers, strict=True):
            if below.ready:
                left_here, ended_here = partial(left, below.name, tier.bit), partial(ended, below.name)
                below.remove(which.namespace, which.key, left_here, ended_here)
            else:
                ended(below.name, below.trouble)
        if not self._lower:
            self._busy = False
            respond(wire.RemovedBelow([]))
