"""What an answer says of itself, however it is cut: as SGLang 0.5.23 writes it, plain and streamed."""

import json
from typing import Any

import pytest

from kvd.router.usage import Usage

OPENAI = {"prompt_tokens": 99, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 64}}
ANTHROPIC = {"input_tokens": 35, "output_tokens": 3, "cache_read_input_tokens": 64}
RESPONSES = {"input_tokens": 99, "input_tokens_details": {"cached_tokens": 64}, "output_tokens": 3}
TEXT = 'it writes "cached_tokens": 7 and data: {"completion_tokens": 8}\n\n'


def sse(event: dict[str, Any], kind: str = "", gap: str = "") -> bytes:
    said = json.dumps(event, separators=(",", f":{gap}"))
    return (f"event: {kind}\n" if kind else "").encode() + f"data: {said}\n\n".encode()


def chat(**more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": {"content": TEXT}}], "usage": None, **more}


STREAMS = {
    "/v1/chat/completions": [sse(chat()), sse(chat()), sse(chat()), sse(chat(choices=[], usage=OPENAI))],
    "/generate": [
        sse({"text": TEXT, "meta_info": {"completion_tokens": n, "cached_tokens": 64}}, gap=" ") for n in (1, 2, 3)
    ],
    "/v1/messages": [
        sse({"type": "message_start", "message": {"usage": ANTHROPIC | {"output_tokens": 0}}}, "message_start"),
        sse({"type": "content_block_delta", "delta": {"text": TEXT}}, "content_block_delta"),
        sse({"type": "message_delta", "usage": ANTHROPIC}, "message_delta"),
    ],
    "/v1/responses": [
        sse({"type": "response.created", "response": {"usage": None}}, "response.created"),
        sse({"type": "response.output_text.delta", "delta": TEXT}, "response.output_text.delta"),
        sse({"type": "response.completed", "response": {"usage": RESPONSES}}, "response.completed"),
    ],
}


@pytest.mark.parametrize("path", STREAMS)
def test_figures_are_found_wherever_the_stream_is_cut(path: str) -> None:
    stream = b"".join(STREAMS[path]) + b"data: [DONE]\n\n"
    for cut in range(len(stream)):
        usage = Usage(path)
        for part in (stream[:cut], stream[cut:]):
            usage.heard(part)
        assert (usage.began, usage.cached, usage.tokens) == (True, 64, 3), cut


@pytest.mark.parametrize("size", [1, 7, 64])
def test_figures_are_found_in_small_pieces(size: int) -> None:
    stream, usage = b"".join(STREAMS["/generate"]), Usage("/generate")
    for at in range(0, len(stream), size):
        usage.heard(stream[at : at + size])
    assert (usage.began, usage.cached, usage.tokens) == (True, 64, 3)


@pytest.mark.parametrize("told", [OPENAI, ANTHROPIC, RESPONSES])
@pytest.mark.parametrize("indent", [None, 2])
def test_figures_of_a_plain_answer_are_found(told: dict[str, Any], indent: int | None) -> None:
    usage = Usage("/v1/chat/completions")
    usage.heard(json.dumps({"text": TEXT, "usage": told, "more": "x" * 500}, indent=indent).encode())
    assert (usage.cached, usage.tokens, usage.began) == (64, 3, False)


def test_without_figures_events_are_counted() -> None:
    usage = Usage("/v1/chat/completions")
    assert [usage.heard(part) for part in (sse(chat()), sse(chat()) * 3, b"data: [DONE]\n\n")] == [1, 3, 0]
    assert (usage.events, usage.tokens, usage.cached) == (4, 4, None)


def test_a_stream_of_responses_begins_with_its_first_token() -> None:
    usage, events = Usage("/v1/responses"), STREAMS["/v1/responses"]
    assert usage.heard(events[0]) == 0
    assert not usage.began
    assert usage.heard(events[1]) == 1
    assert usage.began


def test_what_is_kept_between_pieces_is_small() -> None:
    usage = Usage("/generate")
    for _ in range(100):
        usage.heard(b"x" * 100_000)
    assert len(usage._kept) <= 64
