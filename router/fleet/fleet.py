"""The fleet: workers that join and leave, and all that steering asks about them. Implements kvd.router.knowledge.

    settings, `add`      a worker is a member at once
    a node's stream      its workers are asked who they are, and become members unless they are some already
    `drain`              no new requests; gone when it has none left.   `remove`: gone at once, its requests move on

Always true: a worker has a manner only while its tokens are known to be ours and its blocks can be named; a block
counts only where its node's stream is exact. Each worker has rates of its own: equal settings on unequal machines
would mix, and what a worker says of itself does not tell machines apart. Nothing here blocks; the job ends only when
it is cancelled.
"""

import asyncio
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvd import wire
from kvd.router.fleet.crew import Crew, Doors, Reported
from kvd.router.fleet.linking import UNTOLD, Stated, links, seen_from_here
from kvd.router.fleet.members import MemberView, State
from kvd.router.fleet.membership import DRAINS, NO_LINK, Entry, Membership
from kvd.router.fleet.nodes import NodeAt, Nodes
from kvd.router.fleet.tokenisers import Tokenisers
from kvd.router.fleet.told import Told
from kvd.router.fleet.watch import Watch
from kvd.router.knowledge import Manner
from kvd.router.load import Report
from kvd.router.matching import Member, Members, matched
from kvd.router.pages.metrics import named
from kvd.router.policies.choice import Matched
from kvd.router.rates import Rates
from kvd.router.steering import Worker

_TICK_S: Final = 0.1
_LOOK_S: Final = 1.0
_TIERS: Final = {wire.NVME: "nvme", wire.SHARED: "shared"}  # whose speed nodes tell, as rates call them
_SOON: Final = "it is known from the next look on, a moment from now"
_Kind = tuple[str, int]  # model, most tokens of a prefill step: what else makes one faster is a factor


@dataclass(frozen=True, slots=True)
class Options:
    """`nodes`: streams to follow. `model_path`: where the tokenizer is, whatever workers say. `index_blocks`: known at
    once, of all workers and tiers. `key`: the workers' API key."""

    nodes: Sequence[NodeAt] = ()
    model_path: Path | None = None
    join_announced: bool = True
    index_blocks: int = 8_000_000
    key: bytes | None = None


class Fleet:
    """Used by one event loop. `attach` before `run`; `close` after it."""

    def __init__(self, workers: Iterable[Worker], options: Options) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._tokenisers = Tokenisers(options.model_path)
        self._nodes = Nodes(options.nodes, options.index_blocks)
        self._members = Membership(self._watch, self._unwatch)
        self._credited: dict[Manner, Members] = {}  # who has blocks to be matched, by how it names them
        self._kinds: dict[_Kind, Rates] = {}
        self._manner_of: dict[str, Manner] = {}  # that are credited, as of the last look at everything
        self._names: dict[str, set[str]] = {}  # what requests call what is served -> by whom
        self._group: asyncio.TaskGroup | None = None
        self._jobs: dict[Watch, asyncio.Task[None]] = {}
        self._due = True  # something became known
        self._looked_at = -1e9
        self._report: Reported | None = None
        for worker in workers:
            self._members.configured(worker)

    def attach(self, steering: Crew, doors: Doors, reported: Reported | None = None) -> None:
        """Who is told of comings and goings, and of loads. Workers of the settings are known to them already."""
        self._members.attach(steering, doors)
        self._report = reported

    async def run(self) -> None:
        """Ends when it is cancelled, or when something here fails that must not."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for entry in self._members:
                self._start(entry.watch)
            while True:
                now = self._loop.time()
                self._nodes.tick(now)
                if self._due or now - self._looked_at >= _LOOK_S:
                    self._due, self._looked_at = False, now
                    self._look(now)
                await asyncio.sleep(_TICK_S)

    def close(self) -> None:
        """May be called twice."""
        for entry in self._members:
            entry.watch.close()
        self._nodes.close()
        self._tokenisers.close()

    # What steering asks: kvd.router.knowledge.Knowledge

    def serving(self, model: str | None) -> Container[str] | None:
        """SGLang answers whatever a request calls its model; so one that nobody is known to serve, everybody does."""
        return self._names.get(model) if model is not None else None

    def manner(self, worker: str) -> Manner | None:
        return self._manner_of.get(worker)

    def matched(
        self, chains: Mapping[Manner, Sequence[int]], tokens: int, stored: Mapping[Manner, Sequence[int]]
    ) -> dict[str, Matched]:
        nodes = self._nodes
        result: dict[str, Matched] = {}
        for manner, chain in chains.items():
            members = self._credited.get(manner)
            if members is None:
                continue
            found = nodes.index.match(chain)
            if manner in stored:  # tiers may have blocks of an event's names too: pages of requests that name no key
                found = {n: blocks for n, blocks in found.items() if (at := nodes.holders.place(n)) and at.worker}
                found |= nodes.index.match(stored[manner])
            if found:
                result |= matched(found, nodes.sure, members, tokens)
        return result

    def rates(self, worker: str) -> Rates:
        entry = self._members.find(worker)
        return entry.rates if entry is not None else Rates()

    # What people ask and order

    def add(self, url: str) -> str:
        """A worker joins, or drains no more; its name. Raises Refused."""
        self._due = True
        return self._members.add(url)

    def drain(self, name: str) -> None:
        """It gets nothing new, and leaves when it has nothing left. Raises Refused."""
        self._due = True
        self._members.drain(name)

    def remove(self, name: str) -> None:
        """It leaves at once; what it is answering goes on elsewhere where it can. Raises Refused."""
        self._members.remove(name)

    def state(self, name: str) -> State:
        """ "gone" for whoever is not there."""
        entry = self._members.find(name)
        return "gone" if entry is None else entry.state

    def members(self) -> list[MemberView]:
        """All that are there; those that are only being asked who they are are left out."""
        return [self._view(entry) for entry in self._members if entry.admitted]

    def describe(self) -> dict[str, float]:
        """Numbers for /kvd/metrics, by name."""
        views = self.members()
        numbers: dict[str, float] = {
            named("workers", state=state): count for state, count in Counter(view.state for view in views).items()
        }
        numbers |= {named("credit", worker=view.name): view.credit for view in views}
        numbers |= {named("parity_differs", worker=view.name): view.parity == "differs" for view in views}
        return {**numbers, **self._nodes.numbers()}

    # Putting together what is known

    def _look(self, now: float) -> None:
        announced = self._announced()
        if self._options.join_announced:
            self._members.announced(announced, not any(map(self._nodes.why, self._nodes)), now)
        self._members.go_on()
        there = {entry.name: entry for entry in self._members if entry.admitted}
        told = {name: entry.watch.told for name, entry in there.items() if entry.watch.told is not None}
        stated = {
            n: Stated(one.life, one.block_tokens, one.format) for n, one in told.items() if not there[n].draining
        }
        found = links(
            stated, {node: [known.source for known in self._nodes.sources(node).values()] for node in self._nodes}
        )
        self._names, self._manner_of = {}, {}
        followed = {id(entry.rates.kind) for entry in there.values()}
        self._kinds = {kind: rates for kind, rates in self._kinds.items() if id(rates) in followed}
        credited: dict[Manner, dict[str, Member]] = {}
        most: dict[tuple[str, str], int] = {}
        for name, entry in there.items():
            entry.link = found.get(name, DRAINS if entry.draining else NO_LINK)
            if (manner := entry.watch.credited) is not None:
                self._manner_of[name] = manner
            if (one := told.get(name)) is None:
                continue
            entry.rates.token_bytes, entry.rates.chunk_tokens = one.token_bytes, one.chunk_tokens
            entry.rates.follow(self._kinds.setdefault((one.serving.model_path, one.chunk_tokens), Rates()))
            for called in one.names():
                self._names.setdefault(called, set()).add(name)
            if (member := entry.link.member) is None:
                entry.watch.doubt(announced.get(name, ""))
                continue
            for speed in self._nodes.speeds(member.node):
                if speed.medium in _TIERS:
                    entry.rates.told(_TIERS[speed.medium], speed.latency_s, speed.bytes_per_s)
            if one.most_tokens:
                most[member.node, member.worker] = one.most_tokens // one.block_tokens + 1
            if manner is not None:
                credited.setdefault(manner, {})[name] = member
        self._credited = {manner: Members(members) for manner, members in credited.items()}
        self._nodes.bound(most)

    def _announced(self) -> dict[str, str]:
        """Lives of the workers that nodes tell of, by the URLs at which they are reached from here."""
        found: dict[str, str] = {}
        for node in self._nodes:
            for known in self._nodes.sources(node).values():
                if known.source.worker and (url := seen_from_here(known.source.worker, node)) is not None:
                    found[url] = known.source.life
        return found

    def _view(self, entry: Entry) -> MemberView:
        watch, link = entry.watch, entry.link
        verdict, node = watch.verdict(), link.member.node if link.member is not None else ""
        why, remedy = link.why, link.remedy
        if not verdict.credit:
            why, remedy = f"{verdict.what} {verdict.where}".rstrip(), verdict.remedy
        elif link.member is not None:
            why, remedy = self._nodes.unsure(node, link.member.worker)
            why = why or ("" if entry.name in self._manner_of else _SOON)
        elif link is UNTOLD:  # maybe only because one that would tell of it cannot be heard
            remedy = next(filter(None, map(self._nodes.remedy, self._nodes)), remedy)
        return MemberView(
            entry.name, entry.state, entry.origin, watch.told.serving.served_name if watch.told else "", node, not why,
            why, remedy, watch.health.why, verdict.state, self._members.running(entry),
        )  # fmt: skip

    # Watching

    def _watch(self, worker: Worker) -> Watch:
        async def manner_of(told: Told) -> Manner:
            return await self._tokenisers.manner(told, self._manners)

        def reported(report: Report) -> None:
            if self._report is not None and self._members.find(worker.name) is not None:
                self._report(worker.name, report)

        watch = Watch(worker, self._options.key, manner_of, reported, self._changed)
        if self._group is not None:
            self._start(watch)
        return watch

    def _start(self, watch: Watch) -> None:
        assert self._group is not None
        self._jobs[watch] = self._group.create_task(watch.run(), name=f"watch {watch.worker.name}")

    def _unwatch(self, entry: Entry) -> None:
        job = self._jobs.pop(entry.watch, None)
        if job is not None:
            job.cancel()
        entry.watch.close()
        self._manner_of.pop(entry.name, None)
        self._due = True

    def _changed(self) -> None:
        self._due = True

    def _manners(self) -> list[Manner]:
        return [entry.watch.manner for entry in self._members if entry.watch.manner is not None]
