"""Asks workers for tokens, and keeps each one's parity up to date.

A worker is asked nine short questions every five minutes. Never raises for what it does; that is a verdict.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from kvd.errors import UNDECODABLE, Unavailable
from kvd.router.asking import Asker
from kvd.router.tokens.outcome import NoTokens
from kvd.router.tokens.parity import PROBE_EVERY_S, Canary, Parity, Verdict, canaries
from kvd.router.tokens.requests import CHAT, Tokeniser

DEADLINE_S: Final = 10.0
PATH: Final = "/tokenize"

Clock = Callable[[], float]


class Probe:
    """One worker's canaries, asked again and again by `keep`. The asker stays its owner's."""

    def __init__(self, asker: Asker, tokeniser: Tokeniser, clock: Clock | None = None) -> None:
        self._asker = asker
        self._clock = clock
        known = [(canary, _expected(tokeniser, canary)) for canary in canaries(tokeniser.special_tokens)]
        self._canaries = [canary for canary, ids in known if ids is not None]
        self.parity = Parity({canary.name: ids for canary, ids in known})

    async def once(self) -> Verdict:
        """All canaries, one after the other; the first that is not answered ends the round."""
        for canary in self._canaries:
            try:
                ids = await tokenize(self._asker, canary.body)
            except Unavailable as failure:
                self.parity.unheard(failure.message)
                break
            self.parity.heard(canary.name, ids, self._now())
        return self.verdict()

    async def keep(self, told: Callable[[Verdict], Awaitable[None] | None], every_s: float = PROBE_EVERY_S) -> None:
        """Until cancelled; `told` hears every round's verdict. A worker not known yet is asked more often."""
        while True:
            verdict = await self.once()
            heard = told(verdict)
            if heard is not None:
                await heard
            await asyncio.sleep(every_s if verdict.state != "unknown" else min(every_s, DEADLINE_S))

    def verdict(self) -> Verdict:
        return self.parity.verdict(self._now())

    def _now(self) -> float:
        return asyncio.get_running_loop().time() if self._clock is None else self._clock()


async def tokenize(asker: Asker, body: Mapping[str, Any]) -> list[int]:
    """The worker's ids of a text or a chat. Raises Unavailable, which says what it answered instead."""
    answer = await asker.ask("POST", PATH, msgspec.json.encode(body), DEADLINE_S)
    try:
        return msgspec.json.decode(answer, type=_Answer).tokens
    except UNDECODABLE as error:
        raise Unavailable(f"{asker.worker.name}{PATH} answers with no tokens: {error}") from error


class _Answer(msgspec.Struct):
    tokens: list[int]


def _expected(tokeniser: Tokeniser, canary: Canary) -> Sequence[int] | None:
    if canary.chat:
        return tokeniser.tokenise(CHAT, canary.body)[0].ids
    try:
        return tokeniser.text(str(canary.body["prompt"]))
    except NoTokens:
        return None
