"""The router's own questions to a worker: small, bounded, over connections that stay open between them.

Raises Unavailable, and nothing else, whatever a worker does: no answer in time, too much of one, no HTTP, another
status than 200. A question that went into a connection just closing is asked once more; none of them changes a worker.
"""

import asyncio
from typing import Final

from kvd.errors import Unavailable
from kvd.router.proxy.pool import Pool
from kvd.router.proxy.upstream import Connection, Lost
from kvd.router.steering import Worker

MOST_BYTES: Final = 16 << 20
_MOST_IDLE = 2
_CONNECT_S = 2.0
_OF_BODY = (b"content-type", b"content-encoding")


class Collector:
    """An answer, all of it. Implements kvd.router.proxy.upstream.Receiver."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.whole: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()  # raises Lost
        self._most_bytes = most_bytes
        self._status = 0
        self._body = bytearray()
        self.fields: list[tuple[bytes, bytes]] = []  # that say what its body is

    @property
    def begun(self) -> bool:
        """The head has come."""
        return self._status > 0

    def answer(
        self, status: int, fields: list[tuple[bytes, bytes]], length: int | None, body: bytes, whole: bool
    ) -> None:
        self._status = status
        self.fields = [pair for pair in fields if pair[0] in _OF_BODY]
        self.more(body, whole)

    def more(self, body: bytes, whole: bool) -> None:
        if self.whole.done():
            return
        self._body += body
        if len(self._body) > self._most_bytes:
            self._body.clear()
            self.whole.set_exception(Lost(f"the answer has more than {self._most_bytes} bytes"))
        elif whole:
            self.whole.set_result((self._status, bytes(self._body)))

    def lost(self, why: str) -> None:
        if not self.whole.done():
            self.whole.set_exception(Lost(why))


class Asker:
    """Asks one worker. `key`: its API key. Used by one event loop; `close` may be called twice."""

    def __init__(self, worker: Worker, key: bytes | None = None, most_bytes: int = MOST_BYTES) -> None:
        self.worker = worker
        self._pool = Pool(worker, _CONNECT_S, _MOST_IDLE)
        self._key = key
        self._most_bytes = most_bytes

    async def ask(self, method: str, path: str, body: bytes = b"", within_s: float = 2.0) -> bytes:
        """The body of the answer, which has status 200."""
        status, said = await self.answer(method, path, body, within_s)
        if status != 200:
            shown = repr(said[:200].decode(errors="replace"))[1:-1]  # no control characters into logs and terminals
            raise self._unavailable(path, f"status {status} {shown}".rstrip())
        return said

    async def answer(self, method: str, path: str, body: bytes = b"", within_s: float = 2.0) -> tuple[int, bytes]:
        """Status and body, whatever they are."""
        try:
            async with asyncio.timeout(within_s):
                return await self._exchange(method, path, body)
        except TimeoutError:
            raise self._unavailable(path, f"no answer within {within_s:g} s") from None
        except (Lost, ValueError) as lost:  # ValueError: its host is no name that could be looked up
            raise self._unavailable(path, str(lost)) from lost

    def close(self) -> None:
        self._pool.close()

    async def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        idle = self._pool.take_nowait()
        if idle is not None:
            collector = Collector(self._most_bytes)
            try:
                return await self._over(idle, collector, method, path, body)
            except Lost:
                if collector.begun:
                    raise
        return await self._over(await self._pool.connect(), Collector(self._most_bytes), method, path, body)

    async def _over(
        self, connection: Connection, collector: Collector, method: str, path: str, body: bytes
    ) -> tuple[int, bytes]:
        lines = [b"%b %b HTTP/1.1" % (method.encode(), path.encode()), b"host: " + self.worker.authority]
        if self._key is not None:
            lines.append(b"authorization: Bearer " + self._key)
        if method == "POST":
            lines += [b"content-type: application/json", b"content-length: %d" % len(body)]
        try:
            connection.send(method, b"\r\n".join(lines) + b"\r\n\r\n", body, collector)
            return await collector.whole
        finally:
            if not collector.whole.done() or collector.whole.cancelled() or collector.whole.exception() is not None:
                connection.abandon()

    def _unavailable(self, path: str, why: str) -> Unavailable:
        return Unavailable(f"{self.worker.name}{path}: {why}", "is an SGLang server running there?")
