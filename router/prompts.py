"""What a request is, before a worker is chosen: its model, its length, the blocks it would use at each kind of worker.

Tokens are made as every kind of worker makes them that serves its model: normally there is one kind. Long ones are
made in a thread. Whatever goes wrong there costs the request its prefix credit and nothing else; it is counted, and
said once of each kind.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from kvd.router.knowledge import Knowledge, Manner
from kvd.router.steering import Incoming
from kvd.router.tokens.outcome import Why
from kvd.router.tokens.requests import Tokenised, Tokeniser
from kvd.router.transcript import one_answer

log = logging.getLogger("kvd.router")
BYTES_PER_TOKEN: Final = 4  # of a body whose tokens are not known
MOST_MEDIA_TOKENS: Final = 4096  # of one with media: a megabyte of image is a thousand or two
_AT_ONCE_BYTES: Final = 128 << 10  # bodies; rendering and hashing what is longer takes milliseconds
NO_MANNER: Final = "no credit"  # beside `Why`: there is no worker whose tokens could be made
FAILED: Final = "failed"
_MOST_KINDS: Final = 32
_MOST_DETAIL: Final = 120  # characters
_MOST_THREADS: Final = 2

_Chains = dict[Manner, Sequence[int]]
_Made = tuple[dict[Manner, list[Tokenised]], _Chains, _Chains]


class Prompt(msgspec.Struct, frozen=True, eq=False):
    """One request. A batch is as long as all its prompts, and has the blocks of the first.

    `chains`: block hashes by kind of worker; `stored`: those of its pages in kvd's tiers, where they are others.
    `exact`: one prompt, and its tokens are known.
    """

    model: str | None
    stream: bool
    tokens: int
    exact: bool
    single: bool  # there is one answer
    chains: Mapping[Manner, Sequence[int]]
    chain: Sequence[int] = ()  # one of them
    block_tokens: int = 1
    stored: Mapping[Manner, Sequence[int]] = {}
    unknown: str = ""  # why its tokens are not known, in a few words


class Prompts:
    """`counts`: requests by what became of their tokens, "tokens" or why there are none."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._knowledge = knowledge
        self.counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self._threads = asyncio.Semaphore(_MOST_THREADS)

    async def of(self, request: Incoming, workers: Sequence[str]) -> Prompt:
        """Never raises for what is in the request; may be cancelled."""
        body = request.json
        told: dict[str, Any] = body if isinstance(body, dict) else {}
        model = request.model
        made: dict[Manner, list[Tokenised]] = {}
        chains: _Chains = {}
        stored: _Chains = {}
        unknown = ""
        try:
            manners = self._manners(workers, model)
            if not manners:
                self.counts[NO_MANNER] += 1
                unknown = NO_MANNER
            elif len(request.body) > _AT_ONCE_BYTES:
                made, chains, stored = await self._in_thread(manners, request.path, body)
            else:
                made, chains, stored = await _made_soon(manners, request.path, body)
        except Exception as error:
            self.failed(error)
            unknown = f"{FAILED}: {type(error).__name__}"
        stream, single = told.get("stream") is True, one_answer(told)
        known = next((manner for manner, each in made.items() if all(one.ids is not None for one in each)), None)
        if known is None:
            tokens, why = self._guess(request.body, made)
            return Prompt(model, stream, tokens, False, single, {}, unknown=unknown or why)
        self.counts["tokens"] += 1
        prompts = made[known]
        tokens, exact = sum(len(each.ids or ()) for each in prompts), len(prompts) == 1
        page_tokens = known.scheme.page_tokens
        return Prompt(model, stream, tokens, exact, single and exact, chains, chains[known], page_tokens, stored)

    def _guess(self, body: bytes, made: Mapping[Manner, list[Tokenised]]) -> tuple[int, str]:
        """How long a prompt may be that has no tokens, and why it has none, which is counted."""
        none = next((one for each in made.values() for one in each if one.reason is not None), None)
        tokens = len(body) // BYTES_PER_TOKEN + 1
        if none is None or none.reason is None:
            return tokens, ""
        self.counts[none.reason] += 1
        detail = repr(none.detail[:_MOST_DETAIL])[1:-1]  # no control characters into logs and terminals
        most = MOST_MEDIA_TOKENS if none.reason == Why.MULTIMODAL else tokens
        return min(tokens, most), f"{none.reason}: {detail}" if detail else str(none.reason)

    def failed(self, error: Exception) -> None:
        """Counted, and said once of each kind."""
        self.counts[FAILED] += 1
        kind = type(error).__name__
        if kind not in self._said and len(self._said) < _MOST_KINDS:
            self._said.add(kind)
            log.exception(
                "steering failed at a request, which is served all the same; the next %s is only counted",
                kind,
                exc_info=error,
            )

    async def _in_thread(self, manners: list[Manner], path: str, body: Any) -> _Made:
        """A thread goes on when nobody wants its answer any more, so the next one waits until it is done."""
        await self._threads.acquire()
        work = asyncio.get_running_loop().run_in_executor(None, _made, manners, path, body)
        work.add_done_callback(lambda _: self._threads.release())
        return await asyncio.shield(work)

    def _manners(self, workers: Sequence[str], model: str | None) -> list[Manner]:
        known = self._knowledge
        names = known.serving(model)
        serving = workers if names is None else [worker for worker in workers if worker in names] or workers
        return list(dict.fromkeys(manner for worker in serving if (manner := known.manner(worker)) is not None))


def _made(manners: Iterable[Manner], path: str, body: Any) -> _Made:
    """Tokens of every prompt, made once by those who make them alike, and the chains."""
    done: dict[Tokeniser, list[Tokenised]] = {}
    for manner in manners:
        if manner.tokeniser not in done:
            done[manner.tokeniser] = manner.tokeniser.tokenise(path, body)
    made = {manner: done[manner.tokeniser] for manner in manners}
    return made, *_chains(made)


async def _made_soon(manners: Iterable[Manner], path: str, body: Any) -> _Made:
    done: dict[Tokeniser, list[Tokenised]] = {}
    for manner in manners:
        if manner.tokeniser not in done:
            done[manner.tokeniser] = await manner.tokeniser.tokenise_soon(path, body)
    made = {manner: done[manner.tokeniser] for manner in manners}
    return made, *_chains(made)


def _chains(made: Mapping[Manner, list[Tokenised]]) -> tuple[_Chains, _Chains]:
    """Blocks as events and as tiers name them."""
    chains, stored = _Chains(), _Chains()
    for manner, (first, *_) in made.items():
        chains[manner] = manner.tokeniser.hashes(first, manner.scheme)
        if in_tiers := manner.tokeniser.stored(first, manner.scheme):
            stored[manner] = in_tiers
    return chains, stored
