"""Steering by knowledge: each request goes where its policy says, by what is known of prefixes, load and speed.

    choose    tokens (kvd.router.prompts) ── what is where: events, and what is on its way ── policy ── decision
    notices   the answer's bytes (kvd.router.usage) ── load, predicted blocks, rates, ledger, decision

A request counts where it goes from the moment it is chosen: its siblings come before it is sent. One that waits in the
queue keeps its tokens, and is matched and scored anew when a worker is free.

When a prompt has been computed is seen in a stream. Any other answer comes when all is over, so its prompt leaves the
load when that was to be expected, and nothing is learnt from it.

Always true: what a choice put into load, predicted blocks and ledger is taken out at `finished`; whatever fails in
here, the request still goes to some worker. Everything that is remembered is bounded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvd.router.activeload import ActiveLoad
from kvd.router.cost import prefix
from kvd.router.decisions import Decisions, Made
from kvd.router.knowledge import Knowledge
from kvd.router.leastbusy import Asked, LeastBusy, Standing
from kvd.router.ledger import Ledger
from kvd.router.policies.choice import Candidate, Matched, Policy
from kvd.router.predicted import Predicted
from kvd.router.prompts import Prompt, Prompts
from kvd.router.rates import Rates
from kvd.router.seen import Seen
from kvd.router.steering import Choice, Incoming, Outcome, Worker
from kvd.router.usage import Usage
from kvd.router.work import Request

_NOTHING = Matched()
_LOOKED_AT_BYTES = 1 << 20  # of a request that is not steered: more may be anything, and decoding holds others up
_TURNS = 4  # ticks from learning to learning: a second


class Life(msgspec.Struct, eq=False):
    """One request at one worker: the note of its choice."""

    id: str  # the router's own: clients may give one of theirs twice
    worker: str
    prompt: Prompt
    chain: Sequence[int]  # as this worker names its blocks
    block_tokens: int
    matched: Matched
    best: int  # leading tokens, where there are most
    made: Made
    usage: Usage
    rates: Rates
    expected_s: float  # until its prompt is computed
    again: bool  # another worker was asked before
    status: int = 0
    expected_at: float = 0.0
    first_at: float | None = None


class Informed(LeastBusy):
    """Implements kvd.router.steering.Steering."""

    def __init__(
        self, workers: Sequence[Worker], most_each: int, most_waiting: int, knowledge: Knowledge, policy: Policy
    ) -> None:
        super().__init__(workers, most_each, most_waiting)
        self.policy = policy
        self.load = ActiveLoad()
        self.predicted = Predicted()
        self.decisions = Decisions()
        self.ledger = Ledger()
        self.prompts = Prompts(knowledge)
        self._knowledge = knowledge
        self._seen = Seen()
        self._unheard: dict[str, Life] = {}  # whose first token we shall not see
        self._ticks = 0
        self._number = 0

    def leave(self, name: str) -> None:
        super().leave(name)
        self.load.forget(name)
        self.predicted.forget(name)

    # -- the choice ---------------------------------------------------------------------------------------

    async def choose(self, request: Incoming, tried: frozenset[str]) -> Choice:
        if not request.routed:
            small = len(request.body) <= _LOOKED_AT_BYTES
            return await self._choose(Asked(request, tried, request.model if small else None))
        prompt = await self.prompts.of(request, list(self._loads))
        return await self._choose(Asked(request, tried, prompt.model, prompt))

    def _serving(self, model: str | None) -> Sequence[Standing]:
        """Whoever has that model; all where nobody has, so that the client hears it from a worker."""
        names, loads = self._knowledge.serving(model), self._loads
        if names is None:
            return list(loads.values())
        return [load for name, load in loads.items() if name in names] or list(loads.values())

    def _pick(self, among: Sequence[Standing], asked: Asked, now: float) -> tuple[Standing, Any]:
        if asked.prompt is None:
            return super()._pick(among, asked, now)
        try:
            life = self._steered(among, asked, now)
        except Exception as error:
            self.prompts.failed(error)
            return super()._pick(among, asked, now)
        return self._loads[life.worker], life

    def _steered(self, among: Sequence[Standing], asked: Asked, now: float) -> Life:
        prompt: Prompt = asked.prompt
        held = self._knowledge.matched(prompt.chains, prompt.tokens, prompt.stored) if prompt.chains else {}
        candidates = self._candidates(among, prompt, held, now)
        request = Request(asked.request.request_id, prompt.tokens, prompt.chain, prompt.block_tokens)
        choice = self.policy.choose(request, candidates, now)
        won = choice.winner.candidate
        worker, matched, load = won.worker, won.matched, won.load
        made = self.decisions.add(request, choice, now, tuple(asked.tried))
        made.unknown = prompt.unknown
        chain, block_tokens = self._chain(worker, prompt)
        cached = max(matched)
        best = max(cached, max(map(max, held.values()), default=0))
        rates = self._knowledge.rates(worker)
        expected_s = rates.prefill_s(load.queued) + rates.prompt_s(prompt.tokens, cached)
        self._number += 1
        life = Life(
            str(self._number), worker, prompt, chain, block_tokens, matched, best, made,
            Usage(asked.request.path), rates, expected_s, bool(asked.tried),
        )  # fmt: skip
        there = prefix(prompt.tokens, matched, rates)  # cheaper to compute than to load: it is not loaded
        loaded = max(0, there.cached - max(matched.gpu, matched.expected))
        self.load.sent(life.id, worker, prompt.tokens, there.cached, now, there.load_s, loaded)
        if chain:
            self.predicted.sent(life.id, worker, chain[matched.gpu // block_tokens :])
        return life

    def _candidates(
        self, among: Sequence[Standing], prompt: Prompt, held: Mapping[str, Matched], now: float
    ) -> list[Candidate]:
        manner_of, load_at, tokens, chains = self._knowledge.manner, self.load.at, prompt.tokens, prompt.chains
        candidates = []
        for standing in among:
            worker = standing.worker.name
            matched = held.get(worker, _NOTHING)
            if chains and (manner := manner_of(worker)) is not None and (chain := chains.get(manner)):
                block_tokens = manner.scheme.page_tokens
                known = matched.gpu // block_tokens
                expected = self.predicted.match(worker, chain, now, known)
                if expected > known:
                    gpu, ram, nvme, shared, _ = matched
                    matched = Matched(gpu, ram, nvme, shared, min(expected * block_tokens, tokens))
            candidates.append(Candidate(worker, matched, load_at(worker, now)))
        return candidates

    def _chain(self, worker: str, prompt: Prompt) -> tuple[Sequence[int], int]:
        """The prompt's blocks as this worker names them; none where it has no credit."""
        manner = self._knowledge.manner(worker) if prompt.chains else None
        return (prompt.chains.get(manner, ()), manner.scheme.page_tokens) if manner is not None else ((), 1)

    # -- what becomes of it -------------------------------------------------------------------------------

    def sent(self, choice: Choice, now: float) -> None:
        life: Life | None = choice.note
        if life is None:
            return
        if not life.prompt.stream:
            life.expected_at = now + life.expected_s
            self._unheard[life.id] = life
        if life.prompt.exact and not life.again:  # who asks again would find itself among those who asked before
            seen = self._seen.note(life.chain, life.best // life.block_tokens) * life.block_tokens
            self.ledger.sent(life.id, seen, life.best, life.matched)

    def first_byte(self, choice: Choice, status: int, now: float) -> None:
        super().first_byte(choice, status, now)
        if choice.note is not None:
            choice.note.status = status

    def progressed(self, choice: Choice, received: bytes, now: float) -> None:
        life: Life | None = choice.note
        if life is None or not received:
            return
        events = life.usage.heard(received)
        if not life.prompt.stream or life.status != 200:
            return
        if life.first_at is None and life.usage.began:
            self._first_token(life, now)
        if events:
            self.load.progressed(life.id, events)

    def _first_token(self, life: Life, now: float) -> None:
        life.first_at = now
        life.made.first_token(now)
        self.predicted.prefilled(life.id, life.worker, now)
        served = self.load.first_token(life.id, now, life.usage.cached)
        if served is not None and life.prompt.exact:
            life.rates.prefilled(*served)

    def finished(self, choice: Choice, outcome: Outcome, now: float) -> None:
        if choice.note is not None:
            try:
                self._ended(choice.note, outcome, now)
            except Exception as error:
                self.prompts.failed(error)
        super().finished(choice, outcome, now)

    def _ended(self, life: Life, outcome: Outcome, now: float) -> None:
        usage = life.usage
        answered = outcome == "answered" and life.status == 200
        if answered:
            self._learn(life, now)
        self.load.finished(life.id, now)
        self._unheard.pop(life.id, None)
        if life.first_at is None:
            if answered:  # events that tell of its blocks are on their way
                self.predicted.prefilled(life.id, life.worker, now)
            else:
                self.predicted.ended(life.id, life.worker)
        if answered and usage.cached is not None:
            self.ledger.answered(life.id, life.prompt.tokens, usage.cached, self._still(life, usage.cached))
        else:
            self.ledger.dropped(life.id)
        said = f"status {life.status}" if outcome == "answered" and not answered else outcome
        # Of a length that is a guess it would be any part, more than the whole too.
        life.made.ended(now, said, usage.cached if life.prompt.exact else None)

    def _learn(self, life: Life, now: float) -> None:
        tokens = life.usage.tokens
        if not life.prompt.single or tokens is None:
            return
        life.rates.answered(tokens)
        if life.first_at is not None and tokens > 1:
            load = self.load.at(life.worker, now)
            life.rates.decoded(load.running, load.context_tokens, (now - life.first_at) / (tokens - 1))

    def _still(self, life: Life, cached: int) -> int:
        """What its worker's GPU has of it now, where that makes a difference to the ledger."""
        if max(life.matched.gpu, life.matched.expected) <= cached:
            return 0
        held = self._knowledge.matched(life.prompt.chains, life.prompt.tokens, {})
        return held.get(life.worker, _NOTHING).gpu

    def tick(self, now: float) -> None:
        for life in [life for life in self._unheard.values() if life.expected_at <= now]:
            del self._unheard[life.id]
            self.load.first_token(life.id, now, guessed=True)
        self._learn_from_all()
        super().tick(now)

    def _learn_from_all(self) -> None:
        """Some workers at each tick: the loop has streams to serve."""
        turn = self._ticks % _TURNS
        self._ticks += 1
        rates = [self._knowledge.rates(name) for name in self._loads]
        if not turn:
            for kind in {id(each.kind): each.kind for each in rates if each.kind is not None}.values():
                kind.learn()
        for each in rates[turn::_TURNS]:
            each.learn()

    # -- numbers ------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, float]:
        """What the pages do not say: see kvd.router.pages.metrics for decisions, ledger and load."""
        prompts = {f'prompts_total{{tokens="{why}"}}': count for why, count in self.prompts.counts.items()}
        return super().describe() | prompts | {"in_flight": len(self.load)}
