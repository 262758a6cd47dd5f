"""The least that a router on uvloop and httptools can do: find where messages end, pass their bytes on. In Python.

    python _http_bare.py PORT WORKER_PORT...

It chooses in turn, checks nothing, changes no header, and has no answer to anything that goes wrong: what it takes per
request is what is left to a router of this kind that decides at no cost.
"""

import asyncio
import sys
from collections.abc import Sequence
from itertools import cycle

import httptools
import uvloop


class _Client(asyncio.Protocol):
    def __init__(self, pools: "cycle[_Pool]") -> None:
        self._pools = pools
        self._parser = httptools.HttpRequestParser(self)
        self._parts: list[bytes] = []
        self._whole = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._parser.feed_data(data)
        if self._whole:
            self._whole = False
            request = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            next(self._pools).send(self, request)

    def on_message_complete(self) -> None:
        self._whole = True


class _Upstream(asyncio.Protocol):
    def __init__(self, pool: "_Pool") -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._whole = False
        self.client: _Client | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        client = self.client
        if self._whole:
            self._whole, self.client = False, None
            self._pool.idle.append(self)
        if not client.transport.is_closing():
            client.transport.write(data)

    def on_message_complete(self) -> None:
        self._whole = True

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._pool.idle:
            self._pool.idle.remove(self)
        if self.client is not None:
            self.client.transport.close()


class _Pool:
    """A worker's connections."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._opening: set[asyncio.Task[None]] = set()
        self.idle: list[_Upstream] = []

    def send(self, client: _Client, request: bytes) -> None:
        if self.idle:
            self._use(self.idle.pop(), client, request)
            return
        task = asyncio.get_running_loop().create_task(self._open(client, request))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, client: _Client, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: _Upstream(self), "127.0.0.1", self._port)
        self._use(upstream, client, request)

    @staticmethod
    def _use(upstream: _Upstream, client: _Client, request: bytes) -> None:
        upstream.client = client
        upstream.transport.write(request)


async def serve(port: int, workers: Sequence[int]) -> None:
    pools = cycle([_Pool(worker) for worker in workers])
    server = await asyncio.get_running_loop().create_server(lambda: _Client(pools), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), list(map(int, sys.argv[2:]))))
