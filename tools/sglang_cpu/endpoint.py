"""What a test or demo asks an SGLang server: generation, with its time to first token and what came from which cache.

Stdlib only; blocking; greedy, so that equal prompts have equal answers.
"""

import contextlib
import http.client
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPResponse
from typing import Any

HOST = "127.0.0.1"


class RequestRefused(RuntimeError):
    """The server answered, but not with 200."""

    def __init__(self, what: str, status: int, body: str) -> None:
        super().__init__(f"{what}: HTTP {status}: {body[:500]}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Cached:
    """Prompt tokens that were not computed, by where SGLang found them."""

    device: int = 0
    host: int = 0
    storage: int = 0

    @property
    def total(self) -> int:
        return self.device + self.host + self.storage


@dataclass(frozen=True)
class Generation:
    """`output_ids` are empty for chats: that interface returns text only."""

    output_ids: list[int]
    text: str
    prompt_tokens: int
    cached: Cached
    ttft_s: float  # from sending the request to the first chunk that carries a token
    total_s: float
    meta_info: Mapping[str, Any] = field(repr=False)


class Endpoint:
    """One server's HTTP interface."""

    def __init__(self, port: int, admin_key: str, model: str) -> None:
        self.port = port
        self.admin_key = admin_key
        self._model = model

    def generate(
        self,
        *,
        input_ids: Sequence[int] | None = None,
        text: str | None = None,
        max_new_tokens: int = 8,
        timeout_s: float = 300.0,
        **fields: Any,
    ) -> Generation:
        """Always `max_new_tokens` long; `fields` go into the request as they are (`rid`, `cache_salt`...)."""
        assert (input_ids is None) != (text is None), "give input_ids or text"
        prompt = {"text": text} if input_ids is None else {"input_ids": list(input_ids)}
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body = {**prompt, "sampling_params": sampling, "stream": True, **fields}
        begin = time.monotonic()
        first_s: float | None = None
        last: dict[str, Any] = {}
        for chunk in self._stream("/generate", body, timeout_s):
            last = chunk
            if first_s is None and chunk.get("output_ids"):
                first_s = time.monotonic() - begin
        if first_s is None:
            raise RequestRefused("POST /generate", 200, f"no token: {last}")
        meta = last["meta_info"]
        return Generation(
            output_ids=last["output_ids"],
            text=last.get("text", ""),
            prompt_tokens=meta["prompt_tokens"],
            cached=cached_by_tier(meta.get("cached_tokens_details")),
            ttft_s=first_s,
            total_s=time.monotonic() - begin,
            meta_info=meta,
        )

    def chat(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int = 16, timeout_s: float = 300.0, **fields: Any
    ) -> Generation:
        """/v1/chat/completions, streamed as a chat client would."""
        body = {
            "model": self._model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_cached_tokens_details": True,
            **fields,
        }
        begin = time.monotonic()
        first_s: float | None = None
        text, usage, tiers = "", {}, {}
        for chunk in self._stream("/v1/chat/completions", body, timeout_s):
            said = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if said and first_s is None:
                first_s = time.monotonic() - begin
            text += said
            usage = chunk.get("usage") or usage
            tiers = (chunk.get("sglext") or {}).get("cached_tokens_details") or tiers
        if first_s is None:
            raise RequestRefused("POST /v1/chat/completions", 200, "no token")
        return Generation(
            output_ids=[],
            text=text,
            prompt_tokens=usage["prompt_tokens"],
            cached=cached_by_tier(tiers),
            ttft_s=first_s,
            total_s=time.monotonic() - begin,
            meta_info=usage,
        )

    def request(self, method: str, path: str, body: object = None, timeout_s: float = 60.0) -> str:
        """Any other endpoint: the text of a 200 answer, else RequestRefused."""
        with self._answer(method, path, body, timeout_s) as answer:
            return answer.read().decode()

    @contextlib.contextmanager
    def _answer(self, method: str, path: str, body: object, timeout_s: float) -> Iterator[HTTPResponse]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.admin_key}"}
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                said = answer.read().decode(errors="replace")
                raise RequestRefused(f"{method} {path}", answer.status, said)
            yield answer

    def _stream(self, path: str, body: object, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Server-sent events, each a JSON object."""
        with self._answer("POST", path, body, timeout_s) as answer:
            for line in answer:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                chunk: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise RequestRefused(f"POST {path}", answer.status, json.dumps(chunk["error"]))
                yield chunk


def cached_by_tier(tiers: Mapping[str, Any] | None) -> Cached:
    """SGLang's `cached_tokens_details`; tiers it does not name held nothing."""
    return Cached(**{tier: int((tiers or {}).get(tier) or 0) for tier in ("device", "host", "storage")})
