"""The nodes' streams of prefix events: a view of each, all in one index, and what of them is sure.

A node is called here by the endpoint at which it is followed, not by the name that it gives itself: two nodes of one
name would be taken for each other. Bounded: the index as a whole by `most_blocks`, what one GPU may hold by what its
worker says that it can, how many places a node may name by its equal share of all numbers: one that errs takes nobody
else's.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Final, NamedTuple

import zmq

from kvd import wire
from kvd.router.follow import Follow
from kvd.router.index import Index
from kvd.router.numbering import MOST_HOLDERS, Numbering, Place
from kvd.router.sources import NO_ROOM, Identity, Known
from kvd.router.view import SILENT_S, View
from kvd.sglang_events import GPU

log = logging.getLogger("kvd.router")
SLACK: Final = 2  # what a GPU holds may be counted before what left it is
HEAL_S: Final = 60.0  # before a node is asked anew; doubled each time that this does not help
_RARELY_S: Final = 3600.0  # up to this
_ROOMY: Final = 0.9  # of the index: fuller, it would refuse the same again
_ROOM_REMEDY: Final = (
    "look at who names so many there: `kvdctl ls` and `kvdctl workers` at the node; it is asked anew by and by"
)
_SOURCE_REMEDY: Final = "if it stays so: flush its cache (/flush_cache), from which on its node knows it again"
_INDEX: Final = (
    "it told of more blocks than it says it can hold or than index_blocks allows, or of one under two parents"
)
_INDEX_REMEDY: Final = (
    "raise index_blocks if kvd_router_fleet_index_blocks is near it; its node is asked anew by and by"
)


class NodeAt(NamedTuple):
    """Where a node's kvd publishes, and where it answers requests for replays and snapshots."""

    events: str
    replay: str


class _Numbers(Numbering):
    """One node's part of the numbers of all: at most `share` of them."""

    def __init__(self, shared: Numbering, index: Index, node: str, share: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index
        self._node = node
        self._share = share
        self._here: dict[Place, int] = {}
        self._most: Mapping[str, int] = {}

    def number(self, place: Place) -> int | None:
        place = place._replace(node=self._node)
        if place not in self._here and len(self._here) >= self._share:
            return None
        found = self._shared.number(place)
        if found is not None:
            self._here[place] = found
            self._limit(place, found)
        return found

    def forget(self, place: Place) -> None:
        place = place._replace(node=self._node)
        self._here.pop(place, None)
        self._shared.forget(place)

    def bound(self, most: Mapping[str, int]) -> None:
        """The most blocks on the GPU of one rank, by the worker's URL here."""
        if most != self._most:
            self._most = most
            for place, number in self._here.items():
                self._limit(place, number)

    def _limit(self, place: Place, number: int) -> None:
        """Always: the number may have been another place's before, with another limit."""
        most = self._most.get(place.worker) if place.medium == GPU else None
        self._index.limit(number, self._index.max_blocks if most is None else SLACK * most)


class _Node(NamedTuple):
    view: View
    follow: Follow
    numbers: _Numbers


class Nodes:
    """Lives on the event loop. `tick` some ten times a second. `close` may be called twice."""

    def __init__(self, at: Sequence[NodeAt], most_blocks: int) -> None:
        self.index = Index(most_blocks)
        self.holders = Numbering()
        self._now = -1e9
        self._exact: dict[str, Mapping[Identity, Known]] = {}  # sources of the nodes whose streams are
        self._doubtful: set[tuple[str, str]] = set()  # nodes and workers there of which the index did not take all
        self._heals: dict[str, tuple[float, float]] = {}  # when to ask a node anew, and how long to wait after that
        self._inexact_since: dict[str, float] = {}
        self._said: dict[str, bool] = {}  # whether the log's last line of a node says that it is exact
        self._context = zmq.Context()
        self._nodes: dict[str, _Node] = {}
        self._crowded: set[str] = set()  # nodes that name more places than they may have, as the log's last line says
        share = MOST_HOLDERS // max(1, len(set(at)))
        for one in dict.fromkeys(at):
            numbers = _Numbers(self.holders, self.index, one.events, share)
            view = View(self.index, numbers)
            self._nodes[one.events] = _Node(view, Follow(self._context, one.events, one.replay, view), numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def tick(self, now: float) -> None:
        """Ask for what is missing, and judge which streams are exact."""
        self._now = now
        for node in self._nodes.values():
            node.follow.tick(now)
        self._exact = {name: node.view.sources for name, node in self._nodes.items() if not node.view.why(now)}
        places = (self.holders.place(number) for number in self.index.inexact())
        self._doubtful = {(place.node, place.worker) for place in places if place is not None}
        self._heal(now)
        self._say(now)

    def speeds(self, node: str) -> Sequence[wire.Speed]:
        """Of its tiers, as it last measured them."""
        return self._nodes[node].view.speeds

    def why(self, node: str) -> str:
        """Why what is known of this node is not exact; "" where it is."""
        return self._nodes[node].view.why(self._now)

    def remedy(self, node: str) -> str:
        """What to do where what is known of this node stays inexact; "" where it is exact."""
        what = (
            f"does a kvd run whose events.endpoint is {node}, and is that reachable from here? `kvdctl doctor` there"
        )
        return what if self.why(node) else ""

    def unsure(self, node: str, worker: str) -> tuple[str, str]:
        """Why what a rank of this worker (its URL there) holds does not count, and what to do; "" where all does."""
        if why := self.why(node):
            return why, self.remedy(node)
        sources = self._nodes[node].view.sources
        first = sources.get((worker, 0, ""))
        for rank in count():
            known = sources.get((worker, rank, ""))
            if first is None or known is None or known.source.life != first.source.life:
                break  # it had more ranks in another life
            if known.why:
                return known.why, _ROOM_REMEDY if known.why == NO_ROOM else _SOURCE_REMEDY
        return (_INDEX, _INDEX_REMEDY) if (node, worker) in self._doubtful else ("", "")

    def sources(self, node: str) -> Mapping[Identity, Known]:
        return self._nodes[node].view.sources

    def bound(self, most: Mapping[tuple[str, str], int]) -> None:
        """The most blocks on the GPU of one rank, by (node, the worker's URL there)."""
        for name, node in self._nodes.items():
            node.numbers.bound({url: blocks for (where, url), blocks in most.items() if where == name})

    def sure(self, number: int) -> Place | None:
        """Where this holder is, if all that it said is known, and is all that it has; by its node's stream, as of the
        tick."""
        place = self.holders.place(number)
        if place is None:
            return None
        node, worker, rank, namespace, _ = place
        sources = self._exact.get(node)
        if sources is None or not self.index.exact(number):
            return None
        known = sources.get((worker, rank, namespace))
        return place if known is not None and not known.why else None

    def numbers(self) -> dict[str, float]:
        """For metrics."""
        stats = self.index.stats()
        numbers: dict[str, float] = {f'node_exact{{node="{name}"}}': not self.why(name) for name in self._nodes}
        numbers |= {f'node_crowded{{node="{name}"}}': node.view.crowded for name, node in self._nodes.items()}
        return numbers | {
            "index_blocks": stats.blocks, "index_holders": stats.holders, "index_inexact": stats.inexact,
        }  # fmt: skip

    def _heal(self, now: float) -> None:
        """Ask nodes anew of which not all found room, once there is some: after a minute, and where that did not help
        ever less often, because nothing of a node counts meanwhile."""
        doubtful = {node for node, _ in self._doubtful}
        for name in self._exact:
            view = self._nodes[name].view
            if name not in doubtful and not view.crowded:
                self._heals.pop(name, None)
                continue
            at, pause_s = self._heals.setdefault(name, (now + HEAL_S, HEAL_S))
            if now >= at and self.index.stats().blocks < _ROOMY * self.index.max_blocks:
                pause_s = min(2 * pause_s, _RARELY_S)
                self._heals[name] = now + pause_s, pause_s
                view.renew()

    def _say(self, now: float) -> None:
        """One line for each change that lasts: a lost batch is made up for in a moment."""
        for name in self._nodes:
            if name in self._exact:
                self._inexact_since.pop(name, None)
                if not self._said.get(name, False):
                    log.info("node %s: its stream is exact: what its workers hold counts", name)
                self._said[name] = True
                self._say_crowded(name)
            elif now - self._inexact_since.setdefault(name, now) >= SILENT_S and self._said.get(name, True):
                log.warning(
                    "node %s: %s: what its workers hold does not count (%s)", name, self.why(name), self.remedy(name)
                )
                self._said[name] = False

    def _say_crowded(self, name: str) -> None:
        if not self._nodes[name].view.crowded:
            self._crowded.discard(name)
        elif name not in self._crowded:
            self._crowded.add(name)
            log.warning(
                "node %s: it named more ranks, namespaces and media than one node may have: what found no room "
                "does not count (%s)",
                name,
                _ROOM_REMEDY,
            )

    def close(self) -> None:
        for node in self._nodes.values():
            node.follow.close()
        self._context.term()
