"""Asks workers for tokens, and keeps each one's parity up to date.

One short-lived HTTP/1.1 connection for each question: a worker is asked nine short ones every five minutes. Bounded:
an answer above ANSWER_BYTES or later than DEADLINE_S is none. Never raises for what a worker does; that is a verdict.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import httptools
import msgspec

from kvd.errors import Unavailable
from kvd.router.tokens.parity import PROBE_EVERY_S, Canary, Parity, Verdict, canaries
from kvd.router.tokens.requests import CHAT, Tokeniser

DEADLINE_S: Final = 10.0
ANSWER_BYTES: Final = 16 << 20
PATH: Final = "/tokenize"

Clock = Callable[[], float]


class Probe:
    """One worker's canaries, asked again and again by `keep`."""

    def __init__(
        self, host: str, port: int, tokeniser: Tokeniser, api_key: str | None = None, clock: Clock | None = None
    ) -> None:
        self.host, self.port = host, port
        self._api_key = api_key
        self._clock = clock
        known = [(canary, _expected(tokeniser, canary)) for canary in canaries(tokeniser.special_tokens)]
        self._canaries = [canary for canary, ids in known if ids is not None]
        self.parity = Parity({canary.name: ids for canary, ids in known})

    async def once(self) -> Verdict:
        """All canaries, one after the other; the first that is not answered ends the round."""
        for canary in self._canaries:
            try:
                ids = await tokenize(self.host, self.port, canary.body, self._api_key)
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


async def tokenize(host: str, port: int, body: Mapping[str, Any], api_key: str | None = None) -> list[int]:
    """The worker's ids of a text or a chat. Raises Unavailable, which says what it answered instead."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            status, answer = await _post(host, port, PATH, msgspec.json.encode(body), api_key)
    except (OSError, TimeoutError, httptools.HttpParserError) as error:
        raise Unavailable(f"{host}:{port}{PATH}: {error or type(error).__name__}") from error
    if status != 200:
        raise Unavailable(f"{host}:{port}{PATH} answers {status}: {answer[:200].decode(errors='replace')}")
    try:
        return msgspec.json.decode(answer, type=_Answer).tokens
    except msgspec.DecodeError as error:
        raise Unavailable(f"{host}:{port}{PATH} answers with no tokens: {error}") from error


class _Answer(msgspec.Struct):
    tokens: list[int]


class _Reader:
    """httptools' callbacks."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.done = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.done = True


async def _post(host: str, port: int, path: str, body: bytes, api_key: str | None) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        lines = [
            f"POST {path} HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json", "Connection: close",
            f"Content-Length: {len(body)}", *([f"Authorization: Bearer {api_key}"] if api_key else []),
        ]  # fmt: skip
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        answer = _Reader()
        parser = httptools.HttpResponseParser(answer)
        while not answer.done:
            data = await reader.read(1 << 16)
            if not data:
                break  # an answer that ends with its connection is whole
            parser.feed_data(data)
            if len(answer.body) > ANSWER_BYTES:
                raise OSError(f"an answer above {ANSWER_BYTES} bytes")
        return parser.get_status_code(), bytes(answer.body)
    finally:
        writer.close()


def _expected(tokeniser: Tokeniser, canary: Canary) -> Sequence[int] | None:
    if canary.chat:
        return tokeniser.tokenise(CHAT, canary.body)[0].ids
    return tokeniser.text(str(canary.body["prompt"]))
