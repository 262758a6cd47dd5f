"""A question of the router's own to some worker: a small POST, and its JSON answer."""

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from kvd.router.proxy.headers import request_head
from kvd.router.proxy.strict import Head
from kvd.router.proxy.upstream import Lost
from kvd.router.steering import Busy, Incoming, Outcome

if TYPE_CHECKING:
    from kvd.router.proxy.house import House

_WITHIN_S = 2.0
_MOST_BYTES = 16 << 20
_FIELDS = [(b"content-type", b"application/json")]


class _Collector:
    """A small answer, all of it. Implements kvd.router.proxy.upstream.Receiver."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.whole: asyncio.Future[bytes | None] = loop.create_future()  # None: no good answer
        self._parts: list[bytes] = []
        self._size = 0

    def answer(
        self, status: int, fields: list[tuple[bytes, bytes]], length: int | None, body: bytes, whole: bool
    ) -> None:
        if status != 200:
            self._tell(None)
        else:
            self.more(body, whole)

    def more(self, body: bytes, whole: bool) -> None:
        self._parts.append(body)
        self._size += len(body)
        if self._size > _MOST_BYTES:
            self._tell(None)
        elif whole:
            self._tell(b"".join(self._parts))

    def lost(self, why: str) -> None:
        self._tell(None)

    def _tell(self, answer: bytes | None) -> None:
        if not self.whole.done():
            self.whole.set_result(answer)


async def ask(house: "House", request: Incoming, tried: frozenset[str]) -> Any:
    """What a worker answers to a JSON POST, decoded; None where there is no answer within two seconds."""
    try:
        choice = await house.steering.choose(request, tried)
    except Busy:
        return None
    outcome: Outcome = "cancelled"
    connection = None
    collector = _Collector(house.loop)
    try:
        async with asyncio.timeout(_WITHIN_S):
            connection = await house.pools[choice.worker.name].connect()
            head = Head("POST", request.path.encode(), 1, _FIELDS)
            authority = choice.worker.authority
            connection.send(
                "POST",
                request_head(head, authority, len(request.body), request.request_id.encode(), True, house.worker_key),
                request.body,
                collector,
            )
            said = await collector.whole
        outcome = "answered" if said is not None else "no_answer"
        return None if said is None else msgspec.json.decode(said)
    except Lost:
        outcome = "unreachable"
        return None
    except (TimeoutError, msgspec.DecodeError):
        return None
    finally:
        if connection is not None and outcome != "answered":
            connection.abandon()
        house.steering.finished(choice, outcome, house.loop.time())
