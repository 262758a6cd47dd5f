"""Answers of the router and of mock workers as a client reads them: chunks, events, text."""

import json
from typing import Any

from tests.router_harness import Router, post

CHAT = {"model": "mock", "stream": True, "messages": [{"role": "user", "content": "one two three"}]}


def unchunked(reply: bytes) -> bytes:
    """The body of one chunked answer; what is cut short fails."""
    head, _, rest = reply.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return rest
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        n = int(size, 16)
        assert len(rest) >= n + 2, "cut"
        body, rest = body + rest[:n], rest[n + 2 :]
        if n == 0:
            assert not rest
            return body


def payloads(body: bytes) -> list[Any]:
    events = [event for event in body.split(b"\n\n") if event]
    data = [line[6:] for event in events for line in event.split(b"\n") if line.startswith(b"data: ")]
    return [one.decode() if one == b"[DONE]" else json.loads(one) for one in data]


def ask(router: Router, path: str, body: object) -> list[Any]:
    """All events of a stream."""
    return payloads(unchunked(router.talk(post(path, body, "connection: close"), 10)))


def chat_text(events: list[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in events[:-1] for choice in event["choices"])


def counted(first: int, last: int) -> str:
    return "".join(f" w{n}" for n in range(first, last + 1))
