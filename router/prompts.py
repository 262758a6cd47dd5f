"""What a request is, before a worker is chosen: its model, its length, the blocks it would use at each kind of worker.

Tokens are made as every kind of worker makes them that serves its model: normally there is one kind. Long ones are
made in a thread. Whatever goes wrong there costs the request its prefix credit and nothing else; it is counted, and
said once of each kind.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvd.router.knowledge import Knowledge, Manner
from kvd.router.steering import Incoming
from kvd.router.tokens.outcome import Why
from kvd.router.tokens.requests import Tokenised, Tokeniser

log = logging.getLogger("kvd.router")
BYTES_PER_TOKEN: Final = 4  # of a body whose tokens are not known
MOST_MEDIA_TOKENS: Final = 4096  # of one with media: a megabyte of image is a thousand or two
_AT_ONCE_BYTES: Final = 128 << 10  # bodies; rendering and hashing what is longer takes milliseconds
NO_MANNER: Final = "no credit"  # beside `Why`: there is no worker whose tokens could be made
FAILED: Final = "failed"
_MOST_KINDS: Final = 32


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One request. A batch is as long as all its prompts, and has the blocks of the first.

    `chains`: block hashes by kind of worker. `exact`: one prompt, whose tokens are known.
    """

    model: str | None
    stream: bool
    tokens: int
    exact: bool
    single: bool  # there is one answer
    chains: Mapping[Manner, Sequence[int]]
    chain: Sequence[int] = ()  # the first of them
    block_tokens: int = 1


class Prompts:
    """`counts`: requests by what became of their tokens, "tokens" or why there are none."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._knowledge = knowledge
        self.counts: Counter[str] = Counter()
        self._said: set[str] = set()

    async def of(self, request: Incoming, workers: Sequence[str]) -> Prompt:
        """Never raises for what is in the request; may be cancelled."""
        body = request.json
        told: dict[str, Any] = body if isinstance(body, dict) else {}
        named = told.get("model")
        model = named if isinstance(named, str) else None
        stream, single = told.get("stream") is True, _single(told)
        made: dict[Manner, list[Tokenised]] = {}
        chains: dict[Manner, Sequence[int]] = {}
        try:
            manners = self._manners(workers, model)
            if not manners:
                self.counts[NO_MANNER] += 1
            elif len(request.body) > _AT_ONCE_BYTES:
                loop = asyncio.get_running_loop()
                made = await loop.run_in_executor(None, _made, manners, request.path, body)
                chains = await loop.run_in_executor(None, _chains, made)
            else:
                made = await _made_soon(manners, request.path, body)
                chains = _chains(made)
        except Exception as error:
            self.failed(error)
            made = {}
        first = next(iter(made.values()), [])
        reason = next((each.reason for each in first if each.ids is None), None)
        if not first or reason is not None:
            if reason is not None:
                self.counts[reason] += 1
            tokens = len(request.body) // BYTES_PER_TOKEN + 1
            if reason == Why.MULTIMODAL:
                tokens = min(tokens, MOST_MEDIA_TOKENS)
            return Prompt(model, stream, tokens, False, single, {})
        self.counts["tokens"] += 1
        tokens = sum(len(each.ids or ()) for each in first)
        manner, chain = next(iter(chains.items()))
        exact = len(first) == 1
        return Prompt(model, stream, tokens, exact, single and exact, chains, chain, manner.scheme.page_tokens)

    def failed(self, error: Exception) -> None:
        """Counted, and said once of each kind."""
        self.counts[FAILED] += 1
        kind = type(error).__name__
        if kind not in self._said and len(self._said) < _MOST_KINDS:
            self._said.add(kind)
            log.exception("a request goes without prefix credit; the next %s is only counted", kind, exc_info=error)

    def _manners(self, workers: Sequence[str], model: str | None) -> list[Manner]:
        known = self._knowledge
        serving = [worker for worker in workers if known.serves(worker, model)] or workers
        return list(dict.fromkeys(manner for worker in serving if (manner := known.manner(worker)) is not None))


def _single(body: Mapping[str, Any]) -> bool:
    """Whether one answer is asked for."""
    sampling = body.get("sampling_params")
    return body.get("n", 1) in (1, None) and not (isinstance(sampling, dict) and sampling.get("n", 1) not in (1, None))


def _made(manners: Iterable[Manner], path: str, body: Any) -> dict[Manner, list[Tokenised]]:
    """Tokens of every prompt; those who make them alike, do it once."""
    done: dict[Tokeniser, list[Tokenised]] = {}
    for manner in manners:
        if manner.tokeniser not in done:
            done[manner.tokeniser] = manner.tokeniser.tokenise(path, body)
    return {manner: done[manner.tokeniser] for manner in manners}


async def _made_soon(manners: Iterable[Manner], path: str, body: Any) -> dict[Manner, list[Tokenised]]:
    done: dict[Tokeniser, list[Tokenised]] = {}
    for manner in manners:
        if manner.tokeniser not in done:
            done[manner.tokeniser] = await manner.tokeniser.tokenise_soon(path, body)
    return {manner: done[manner.tokeniser] for manner in manners}


def _chains(made: Mapping[Manner, list[Tokenised]]) -> dict[Manner, Sequence[int]]:
    return {manner: manner.tokeniser.hashes(prompts[0], manner.scheme) for manner, prompts in made.items()}
