"""What the mock worker answers: words that count on from the prompt's, in the shapes of SGLang 0.5.23's endpoints.

After `n` words comes ` w<n+1>`, after the token id `i` comes `i + 1`.
"""

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any


def words(path: str, asked: dict[str, Any]) -> tuple[int, int, list[int] | None]:
    """Words of the prompt, tokens to generate, and the prompt's ids where it is made of ids."""
    if path == "/generate":
        prompt = asked.get("input_ids") or asked["text"]
        limit = asked.get("sampling_params", {}).get("max_new_tokens", 128)
    elif path == "/v1/completions":
        prompt, limit = asked["prompt"], asked.get("max_tokens", 16)
    else:
        prompt = " ".join(str(message["content"]) for message in asked["messages"])
        limit = asked.get("max_tokens") or asked.get("max_completion_tokens") or 8
    if isinstance(prompt, list):
        return prompt[-1], limit, prompt
    return len(prompt.split()), limit, None


async def events(
    path: str, asked: dict[str, Any], wait: Callable[[], Awaitable[object]], incremental: bool
) -> AsyncIterator[bytes]:
    """`wait`: before each word. `incremental`: what /generate says is the new text only."""
    n, limit, _ = words(path, asked)
    name = f"mock-{os.getpid()}"
    text, ids = "", []
    opening, closing = SHAPES[path]
    for event in opening(name):
        yield event
    for count in range(1, limit + 1):
        await wait()
        ids.append(n + count)
        word = f" w{n + count}"
        text += word
        reason = "length" if count == limit else None
        if path == "/generate":
            shown, shown_ids = (word, ids[-1:]) if incremental else (text, ids)
            meta = {"id": name, "finish_reason": {"type": "length"} if reason else None}
            meta |= {"prompt_tokens": n, "completion_tokens": count}
            yield sse({"text": shown, "output_ids": shown_ids, "meta_info": meta})
        elif path == "/v1/completions":
            choice: dict[str, Any] = {"index": 0, "text": word, "logprobs": None, "finish_reason": reason}
            if asked.get("return_token_ids"):
                choice["token_ids"] = [n + count]
            yield sse({"id": name, "object": "text_completion", "created": 1, "model": "mock", "choices": [choice]})
        elif path == "/v1/chat/completions":
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": reason}
            yield sse(
                {"id": name, "object": "chat.completion.chunk", "created": 1, "model": "mock", "choices": [choice]}
            )
        else:
            delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
            yield sse(delta, "content_block_delta")
    if (asked.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": n, "completion_tokens": limit, "total_tokens": n + limit}
        kind = "text_completion" if path == "/v1/completions" else "chat.completion.chunk"
        yield sse({"id": name, "object": kind, "created": 1, "model": "mock", "choices": [], "usage": usage})
    for event in closing(name):
        yield event


def sse(event: Any, kind: str = "") -> bytes:
    return (f"event: {kind}\n" if kind else "").encode() + b"data: %b\n\n" % json.dumps(event).encode()


def _chat_opening(name: str) -> list[bytes]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    return [sse({"id": name, "object": "chat.completion.chunk", "created": 1, "model": "mock", "choices": [choice]})]


def _message_opening(name: str) -> list[bytes]:
    usage = {"input_tokens": 1, "output_tokens": 0}
    message = {"id": name, "type": "message", "role": "assistant", "content": [], "model": "mock", "usage": usage}
    message |= {"stop_reason": None, "stop_sequence": None}
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    return [sse({"type": "message_start", "message": message}, "message_start"), sse(block, "content_block_start")]


def _message_closing(name: str) -> list[bytes]:
    delta = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 1}}
    return [
        sse({"type": "content_block_stop", "index": 0}, "content_block_stop"),
        sse(delta, "message_delta"),
        sse({"type": "message_stop"}, "message_stop"),
    ]


def _done(name: str) -> list[bytes]:
    return [b"data: [DONE]\n\n"]


SHAPES = {
    "/generate": (lambda name: [], _done),
    "/v1/completions": (lambda name: [], _done),
    "/v1/chat/completions": (_chat_opening, _done),
    "/v1/messages": (_message_opening, _message_closing),
}


def whole(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    n, limit, _ = words(path, asked)
    text = "".join(f" w{n + count}" for count in range(1, limit + 1))
    usage = {"prompt_tokens": n, "completion_tokens": limit, "total_tokens": n + limit}
    if path == "/generate":
        return {
            "text": text,
            "output_ids": [],
            "meta_info": {"id": "mock", "finish_reason": {"type": "length"}} | usage,
        }
    if path == "/v1/messages":
        return {
            "id": "mock", "type": "message", "role": "assistant", "model": "mock", "stop_reason": "max_tokens",
            "content": [{"type": "text", "text": text}], "usage": {"input_tokens": n, "output_tokens": limit},
        }  # fmt: skip
    if path == "/v1/completions":
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
        return {
            "id": "mock",
            "object": "text_completion",
            "created": 1,
            "model": "mock",
            "choices": [choice],
            "usage": usage,
        }
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    return {
        "id": "mock",
        "object": "chat.completion",
        "created": 1,
        "model": "mock",
        "choices": [choice],
        "usage": usage,
    }
