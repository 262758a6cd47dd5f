"""What a stream has said so far, and the request for the rest: exactly, or not at all."""

import json
from typing import Any

import pytest

from kvd.router.continuation import CannotContinue, Splice, needs_count, rest_of
from kvd.router.proxy.endpoints import Stream
from kvd.router.proxy.events import WholeEvents
from kvd.router.transcript import Transcript


def sse(*events: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % (json.dumps(one).encode() if one != "[DONE]" else b"[DONE]") for one in events)


def generated(text: str, ids: list[int], count: int, reason: str | None = None) -> dict[str, Any]:
    meta = {"id": "a", "prompt_tokens": 3, "completion_tokens": count, "finish_reason": reason and {"type": reason}}
    return {"text": text, "output_ids": ids, "meta_info": meta}


def said(content: str | None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": content, **more}, "finish_reason": reason}
    return {"id": "a", "created": 7, "model": "m", "choices": [choice]}


def transcript(stream: Stream, *events: Any) -> Transcript:
    made = Transcript(stream)
    made.feed(sse(*events))
    made.read()
    return made


CHAT: dict[str, Any] = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
HELLO = transcript("chat", said("", role="assistant"), said("Hel"), said("lo"))


def test_chat_goes_on_after_its_own_words() -> None:
    rest = rest_of(CHAT, HELLO)
    assert rest["messages"] == [*CHAT["messages"], {"role": "assistant", "content": "Hello"}]
    assert rest["continue_final_message"] is True
    assert CHAT["messages"] == [{"role": "user", "content": "hi"}], "the request itself stays as it was"


def test_chat_that_continued_a_message_already_goes_on_in_it() -> None:
    opened = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Oh. "}]
    rest = rest_of(CHAT | {"messages": opened, "continue_final_message": True}, HELLO)
    assert rest["messages"][1:] == [{"role": "assistant", "content": "Oh. Hello"}]
    with pytest.raises(CannotContinue, match="assistant"):
        rest_of(CHAT | {"messages": opened}, HELLO)


def test_a_limit_is_what_is_left_of_it() -> None:
    assert not needs_count(CHAT, HELLO)
    limited = CHAT | {"max_tokens": 10, "max_completion_tokens": 12, "min_tokens": 1}
    assert needs_count(limited, HELLO)
    rest = rest_of(limited, HELLO, counted=2)
    assert (rest["max_tokens"], rest["max_completion_tokens"], rest["min_tokens"]) == (8, 10, 0)
    with pytest.raises(CannotContinue, match="max_tokens"):
        rest_of(limited, HELLO)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2}, {"logprobs": True}, {"tools": [{}]}, {"tool_choice": "auto"}, {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1}, {"response_format": {"type": "json_object"}}, {"tomorrow": 1}, {"regex": "a"},
    ],
)  # fmt: skip
def test_what_depends_on_how_the_text_came_about_cannot_go_on(more: dict[str, Any]) -> None:
    with pytest.raises(CannotContinue, match=next(iter(more))):
        rest_of(CHAT | more, HELLO)


@pytest.mark.parametrize(
    "more",
    [{"n": 1}, {"logprobs": False}, {"tools": None}, {"presence_penalty": 0.0}, {"temperature": 0.7}, {"seed": 1}],
)
def test_what_does_not_depend_on_it_can(more: dict[str, Any]) -> None:
    assert rest_of(CHAT | more, HELLO).items() >= more.items()


@pytest.mark.parametrize(
    "event",
    [
        said(None, tool_calls=[{"index": 0}]),
        said(None, reasoning_content="hm"),
        {"id": "a", "choices": [{"index": 1, "delta": {"content": "b"}}]},
        {"error": {"message": "out of memory"}},
        {"something": "else"},
        [1],
    ],
)
def test_an_odd_event_ends_it(event: Any) -> None:
    with pytest.raises(CannotContinue):
        rest_of(CHAT, transcript("chat", said("Hel"), event, said("lo")))


def test_half_a_character_or_half_a_stop_cannot_go_on() -> None:
    with pytest.raises(CannotContinue, match="half"):
        rest_of(CHAT, transcript("chat", said("Hel\N{REPLACEMENT CHARACTER}")))
    for stop in ("lost", ["x", "lo!"]):
        with pytest.raises(CannotContinue, match="stop"):
            rest_of(CHAT | {"stop": stop}, HELLO)
    assert rest_of(CHAT | {"stop": ["x", "Hello you"[1:4]]}, HELLO)


def test_what_said_nothing_yet_starts_again() -> None:
    assert rest_of(CHAT, transcript("chat", said("", role="assistant"))) == CHAT
    assert rest_of(CHAT, transcript("chat")) == CHAT


def test_ids_are_handed_on_as_ids() -> None:
    asked = {"input_ids": [1, 2, 3], "stream": True, "sampling_params": {"max_new_tokens": 9}}
    for events in (
        [generated("a", [4], 1), generated("ab", [4, 5], 2)],  # each event repeats the text
        [generated("a", [4], 1), generated("b", [5], 2)],  # each has what is new
    ):
        so_far = transcript("generate", *events)
        assert so_far.text == "ab"
        rest = rest_of(asked, so_far)
        assert rest["input_ids"] == [1, 2, 3, 4, 5]
        assert rest["sampling_params"] == {"max_new_tokens": 7}
    assert rest_of({"text": "x", "stream": True}, so_far) == {
        "text": "xab", "stream": True, "sampling_params": {"max_new_tokens": 126}
    }  # fmt: skip


def test_one_event_of_generate_does_not_tell_enough() -> None:
    with pytest.raises(CannotContinue, match="one event"):
        rest_of({"text": "x"}, transcript("generate", generated("a", [4], 1)))


def test_missing_ids_are_noticed() -> None:
    with pytest.raises(CannotContinue, match="missing"):
        rest_of({"text": "x"}, transcript("generate", generated("a", [4], 1), generated("c", [6], 3)))


def test_a_stream_whose_text_is_whole_only_needs_its_end() -> None:
    whole = transcript("chat", said("Hello"), said("", "stop"))
    assert whole.ending(CHAT) == b"data: [DONE]\n\n"
    assert whole.ending(CHAT | {"stream_options": {"include_usage": True}}) is None
    assert transcript("chat", said("Hello", "stop"), "[DONE]").ending(CHAT) == b""
    assert HELLO.ending(CHAT) is None


def test_the_rest_looks_like_the_same_stream() -> None:
    splice = Splice(HELLO, 2)
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    other = {"id": "b", "created": 9, "model": "m", "choices": []}
    seen = splice.translate(
        sse(said("", role="assistant") | {"id": "b"}, said(" you", "stop") | {"id": "b", "created": 9})
        + sse(other | {"usage": usage}, "[DONE]")
    )
    assert seen == sse(
        said(" you", "stop"),
        {"id": "a", "created": 7, "model": "m", "choices": [],
         "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}},
        "[DONE]",
    ).replace(b": ", b":").replace(b", ", b",").replace(b"data:", b"data: ")  # fmt: skip


LONG: dict[str, tuple[Stream, list[Any]]] = {
    "chat": ("chat", [said(f"{n} " * 100) for n in range(900)]),
    "generate": ("generate", [generated("ab" * n, list(range(n)), n) for n in range(1, 300)]),
    "generate, pieces": ("generate", [generated("ab" * 100, [n], n) for n in range(1, 900)]),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_stream_says_the_same_however_it_comes(name: str) -> None:
    """Its oldest events are read while it goes on, those of a short one never."""
    stream, events = LONG[name]
    one_by_one, at_once = Transcript(stream), transcript(stream, *events, "[DONE]")
    for event in [*events, "[DONE]"]:
        one_by_one.feed(sse(event))
    assert one_by_one.text or one_by_one.whole_text, "some of it was read"
    one_by_one.read()
    seen = [(made.text, made.ids, made.tokens, made.odd, made.done, made.head) for made in (one_by_one, at_once)]
    assert seen[0] == seen[1]
    assert seen[0][0].endswith("899 " * 100 if stream == "chat" else "ab")


def test_a_transcript_is_bounded() -> None:
    made = Transcript("chat")
    for _ in range(300):
        made.feed(sse(said("x" * 20_000)))
    made.read()
    assert not made.text
    with pytest.raises(CannotContinue, match="long"):
        rest_of(CHAT, made)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_events_pass_whole_and_unchanged(end: bytes) -> None:
    stream = b"".join(b"data: %d" % n + end for n in range(30))
    for size in (1, 2, 3, 7, 50, 1000):
        events, passed = WholeEvents(), b""
        for at in range(0, len(stream), size):
            part = events.take(stream[at : at + size])
            assert not part or part.endswith(end)
            passed += part
        assert passed + events.rest(b"") == stream


def test_an_endless_event_is_not_kept() -> None:
    events = WholeEvents()
    assert events.take(b"x" * (1 << 20)) == b""
    assert len(events.take(b"x")) == (1 << 20) + 1
    assert events.inside
    assert events.take(b"x\n\n") == b"x\n\n"
    assert not events.inside
