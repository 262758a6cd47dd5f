"""A worker that generates nothing but counts: for tests of the router, which is what is tested. A process of its own.

    python -m tests.mock_worker [PORT HOST]        prints its port and seed, serves until killed

Its model writes one word for each token, and which one follows from all words before it: after `n` words comes
` w<n+1>`, after the token id `i` comes `i + 1`. So a stream that went on elsewhere reads as if nothing had happened
only if the second worker was given everything. Events and answers have the shape of SGLang 0.5.23.

`POST /mock/set` changes how it behaves (see `Mood`), `/mock/step` lets one held event go, `/mock/seen` tells what
came: every request in full, the bytes of every connection, how many answers nobody wanted any more.

What a router asks for itself is answered apart, is not seen, and has moods of its own: who the worker is, its health,
its load, and with `model` its tokens.
"""

import asyncio
import functools
import json
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import uvloop

from tests.mock_answers import SHAPES, events, whole


@dataclass
class Mood:
    """How it behaves."""

    pace_s: float = 0.0  # between events
    hold: bool = False  # each event waits for a step
    die_after: int = -1  # events; then the connection is gone
    exits: bool = False  # and the whole process
    torn: bool = False  # and the event after them was half sent
    status: int = 200
    drop: bool = False  # closes the connection instead of answering
    incremental: bool = False  # /generate: each event has the new text only
    silent: bool = False  # takes requests and never answers
    # What it tells a router that asks for itself
    info: Any = None  # its /server_info, besides what tells it from others; None: it is no SGLang
    model: str = ""  # folder of its tokenizer
    other_tokens: bool = False  # it makes one more than that tokenizer
    health: int = 200
    loads: Any = None
    raw: str = ""  # every answer, whole
    deaf: bool = False  # no answer


@dataclass
class Seen:
    requests: list[dict[str, Any]] = field(default_factory=list)
    connections: list[bytearray] = field(default_factory=list)
    cancelled: int = 0


MOOD, SEEN = Mood(), Seen()
STEPS = asyncio.Semaphore(0)
SEED = random.getrandbits(30)
OWN = (b"GET /server_info", b"GET /health", b"GET /v1/loads", b"POST /tokenize")


class Served(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.raw = bytearray()
        self.parser = httptools.HttpRequestParser(self)
        self.task: asyncio.Task[None] | None = None
        self._fresh()

    def _fresh(self) -> None:
        self.target, self.headers, self.body = b"", [], bytearray()  # type: ignore[var-annotated]

    def data_received(self, data: bytes) -> None:
        self.raw += data
        self.own = self.raw.startswith(OWN) and b"x-kvd-request-id" not in self.raw
        mock = self.raw.startswith((b"POST /mock/", b"GET /mock/"))
        if not self.own and not mock and self.raw not in SEEN.connections:
            SEEN.connections.append(self.raw)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append([name.decode("latin-1"), value.decode("latin-1")])

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        method, path, body = self.parser.get_method().decode(), self.target.decode(), bytes(self.body)
        if not path.startswith("/mock/") and not self.own:
            SEEN.requests.append(
                {"method": method, "target": path, "headers": self.headers, "body": body.decode("latin-1")}
            )
        self._fresh()
        self.task = asyncio.get_running_loop().create_task(self.answer(method, path, body))

    def connection_lost(self, error: Exception | None) -> None:
        if self.task is not None and not self.task.done():
            SEEN.cancelled += not self.own
            self.task.cancel()

    async def answer(self, method: str, path: str, body: bytes) -> None:
        if path.startswith("/mock/"):
            self.send(200, json.dumps(await control(path, body)).encode())
            return
        if self.own:
            await self.answer_router(path, body)
            return
        if MOOD.drop:
            self.transport.abort()
            return
        if MOOD.silent:
            await asyncio.sleep(3600)
        if MOOD.status != 200:
            self.send(MOOD.status, b'{"error":"as told"}')
            return
        asked = json.loads(body) if body.startswith(b"{") else {}
        if path == "/tokenize":
            self.send(200, json.dumps({"tokens": [], "count": len(asked["prompt"].split())}).encode())
        elif path == "/echo":
            self.send(200, body)
        elif path not in SHAPES:
            self.send(200, json.dumps({"path": path, "method": method}).encode())
        elif not asked.get("stream"):
            self.send(200, json.dumps(whole(path, asked)).encode())
        else:
            await self.stream(path, asked)

    async def answer_router(self, path: str, body: bytes) -> None:
        """A router's own question."""
        if MOOD.deaf:
            await asyncio.sleep(3600)
        port = self.transport.get_extra_info("sockname")[1]
        if MOOD.raw:
            self.transport.write(MOOD.raw.encode())
            self.transport.close()
        elif path == "/health":
            self.send(MOOD.health, b"")
        elif path == "/server_info" and MOOD.info is not None:
            start = {"startup_time": {"load_weight": SEED / 7}}
            told = {"port": port, "random_seed": SEED, "internal_states": [start], **MOOD.info}
            self.send(200, json.dumps(told).encode())
        elif path.startswith("/v1/loads") and MOOD.loads is not None:
            self.send(200, json.dumps(MOOD.loads).encode())
        elif path == "/tokenize" and MOOD.model:
            asked = json.loads(body)
            ids = list(tokens(MOOD.model, asked)) + [7] * MOOD.other_tokens
            self.send(200, json.dumps({"tokens": ids, "count": len(ids)}).encode())
        else:
            self.send(404, b"")

    def send(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
        self.transport.write(head + body)

    async def stream(self, path: str, asked: dict[str, Any]) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-from: mock\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        sent = 0
        async for event in events(path, asked, wait, MOOD.incremental):
            if sent == MOOD.die_after:
                if MOOD.torn:
                    self.chunk(event[: len(event) // 2])
                if MOOD.exits:
                    os._exit(9)  # what was written is the kernel's by now: nobody here reads slowly
                self.transport.close()
                return
            self.chunk(event)
            sent += 1
        self.transport.write(b"0\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


async def wait() -> None:
    """Until the next event may go."""
    if MOOD.hold:
        await STEPS.acquire()
    else:
        await asyncio.sleep(MOOD.pace_s)


def tokens(model: str, asked: dict[str, Any]) -> Any:
    """As a worker with this folder makes them."""
    tokeniser = opened(model)
    if "messages" in asked:
        return tokeniser.tokenise("/v1/chat/completions", asked)[0].ids or []
    return tokeniser.text(asked["prompt"])


@functools.cache
def opened(model: str) -> Any:
    from kvd.router.tokens.requests import Tokeniser  # here: few mocks need it, and all would start later
    from kvd.router.tokens.serving import Serving

    return Tokeniser.open(Path(model), Serving())


async def control(path: str, body: bytes) -> Any:
    if path == "/mock/set":
        for name, value in json.loads(body).items():
            assert hasattr(MOOD, name), name
            setattr(MOOD, name, value)
    elif path == "/mock/reset":
        MOOD.__dict__.update(Mood().__dict__)
    elif path == "/mock/step":
        STEPS.release()
    elif path == "/mock/forget":
        SEEN.requests.clear()
        SEEN.connections.clear()
        SEEN.cancelled = 0
    return {
        "requests": SEEN.requests,
        "connections": [raw.decode("latin-1") for raw in SEEN.connections],
        "cancelled": SEEN.cancelled,
    }


async def main() -> None:
    port, host = (int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 2 else (0, "127.0.0.1")
    server = await asyncio.get_running_loop().create_server(Served, host, port, backlog=1024)
    print(server.sockets[0].getsockname()[1], SEED, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
