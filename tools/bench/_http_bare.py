"""The least that a router on uvloop and httptools can do: find where messages end, pass their bytes on. In Python.

    python _http_bare.py PORT WORKER_PORT...
    python _http_bare.py --tokens MODEL PORT WORKER_PORT...

It chooses in turn, checks nothing, changes no header, and has no answer to anything that goes wrong: what it takes per
request is what is left to a router of this kind that decides at no cost. With --tokens it makes the exact tokens of
each chat with kvd-router's own code, looks for them in its index of what was sent where, and takes who has most: what
is left of kvd-router without anything that is strict, fair, knows load, or remembers what it did.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import httptools
import msgspec
import uvloop

from kvd.router.index import Index
from kvd.router.tokens.blocks import Scheme
from kvd.router.tokens.requests import CHAT, Tokeniser
from kvd.router.tokens.serving import Serving

_BLOCK_TOKENS = 64
_MOST_BLOCKS = 1 << 20


class _Client(asyncio.Protocol):
    def __init__(self, choose: "Callable[[bytes], _Pool]") -> None:
        self._choose = choose
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
            self._choose(request).send(self, request)

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


class _ByTokens:
    """Who has most of a chat's blocks, else the next in turn."""

    def __init__(self, pools: Sequence[_Pool], model: Path) -> None:
        self._pools = pools
        self._turn = cycle(range(len(pools)))
        self._tokeniser = Tokeniser.open(model, Serving())
        self._scheme = Scheme(_BLOCK_TOKENS)
        self._index = Index(_MOST_BLOCKS)
        self._decode = msgspec.json.Decoder().decode

    def __call__(self, request: bytes) -> _Pool:
        _, _, body = request.partition(b"\r\n\r\n")
        if not body:
            return self._pools[0]
        (prompt,) = self._tokeniser.tokenise(CHAT, self._decode(body))
        chain = self._tokeniser.hashes(prompt, self._scheme)
        held = self._index.match(chain)
        holder = max(held, key=held.__getitem__) if held else next(self._turn)
        if not self._index.store(holder, None, chain):
            self._index.clear(holder)
        return self._pools[holder]


async def serve(port: int, workers: Sequence[int], model: Path | None) -> None:
    pools = [_Pool(worker) for worker in workers]
    turn = cycle(pools)
    choose: Callable[[bytes], _Pool] = _ByTokens(pools, model) if model is not None else lambda _: next(turn)
    server = await asyncio.get_running_loop().create_server(lambda: _Client(choose), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    words = sys.argv[1:]
    folder = Path(words[1]) if words[0] == "--tokens" else None
    first, *rest = map(int, words if folder is None else words[2:])
    uvloop.run(serve(first, rest, folder))
