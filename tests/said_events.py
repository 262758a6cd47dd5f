"""Events as SGLang sends them, for tests of what becomes of a stream."""

import json
from typing import Any

from kvd.router.proxy.endpoints import Stream
from kvd.router.transcript import Transcript


def sse(*events: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % (json.dumps(one).encode() if one != "[DONE]" else b"[DONE]") for one in events)


def generated(text: str, ids: list[int], count: int, reason: str | None = None) -> dict[str, Any]:
    meta = {"id": "a", "prompt_tokens": 3, "completion_tokens": count, "finish_reason": reason and {"type": reason}}
    return {"text": text, "output_ids": ids, "meta_info": meta}


def said(content: str | None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": content, **more}, "finish_reason": reason}
    return {"id": "a", "created": 7, "model": "m", "choices": [choice]}


def completed(text: str, ids: list[int] | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": reason, **more} | ({} if ids is None else {"token_ids": ids})
    return {"id": "a", "created": 7, "model": "m", "choices": [choice]}


def plain(events: bytes) -> list[Any]:
    """What a client reads in them."""
    data = [event.removeprefix(b"data: ") for event in events.split(b"\n\n")[:-1]]
    return [one.decode() if one == b"[DONE]" else json.loads(one) for one in data]


def transcript(stream: Stream, *events: Any) -> Transcript:
    made = Transcript(stream)
    made.feed(sse(*events))
    made.read()
    return made


HELLO = transcript("chat", said("", role="assistant"), said("Hel"), said("lo"))
