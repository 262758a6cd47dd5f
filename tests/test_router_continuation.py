"""What a stream has said so far, and the request for the rest: exactly, or not at all."""

from typing import Any

import pytest

from kvd.router.continuation import CannotContinue, Splice, needs_count, rest_of
from kvd.router.proxy.endpoints import Stream
from kvd.router.transcript import Transcript
from tests.said_events import HELLO, completed, generated, said, sse, transcript

CHAT: dict[str, Any] = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
USAGE: dict[str, Any] = CHAT | {"stream_options": {"include_usage": True}}


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


def test_where_nothing_is_left_of_a_limit_nothing_more_is_asked() -> None:
    with pytest.raises(CannotContinue, match="nothing is left of max_tokens"):
        rest_of(CHAT | {"max_tokens": 2}, HELLO, 2)
    so_far = transcript("generate", generated("a", [4], 1), generated("ab", [4, 5], 2))
    for limit, asked in ((2, None), (3, 1)):
        request = {"text": "x", "sampling_params": {"max_new_tokens": limit, "min_new_tokens": 1}}
        if asked is None:
            with pytest.raises(CannotContinue, match="nothing is left of max_new_tokens"):
                rest_of(request, so_far)
        else:
            assert rest_of(request, so_far)["sampling_params"] == {"max_new_tokens": asked, "min_new_tokens": 0}


@pytest.mark.parametrize("way", ["include_usage", "continuous_usage_stats"])
def test_where_the_usage_is_wanted_the_text_is_counted(way: str) -> None:
    asked = CHAT | {"stream_options": {way: True}}
    assert needs_count(asked, HELLO)
    assert rest_of(asked, HELLO, 2)["messages"]
    with pytest.raises(CannotContinue, match="usage"):
        rest_of(asked, HELLO, None)


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


EMOJI = list("\N{GRINNING FACE}".encode())
HALVES: dict[str, list[tuple[str, list[int]]]] = {  # what each event brings, as SGLang sends them
    "nothing": [("a", [97]), ("", EMOJI[:1])],
    "nothing for long": [("a", [97]), ("", EMOJI[:1]), ("", EMOJI[1:2])],
    "the words before it": [("a", [97]), ("b ", [98, 32, *EMOJI[:1]])],
    "a space before it": [("a", [97]), (" ", [1])],
    "the characters before it": [("a", [97]), ("\N{CJK UNIFIED IDEOGRAPH-4E2D}", [1, *EMOJI[:1]])],
}
WHOLES: dict[str, list[tuple[str, list[int]]]] = {
    "a character of several ids": [("a", [97]), ("", EMOJI[:1]), ("\N{GRINNING FACE}", EMOJI[1:])],
    "an indentation of one id": [("a\n", [97]), ("   ", [1])],
    "a character of one id": [("a", [97]), ("\N{CJK UNIFIED IDEOGRAPH-4E2D}", [1])],
}


def by_ids(pieces: list[tuple[str, list[int]]], shape: str) -> tuple[dict[str, Any], Transcript]:
    """A request by ids and what it was answered: completions, or /generate in whole texts or in pieces."""
    if shape == "completions":
        asked = {"prompt": [1], "return_token_ids": True, "max_tokens": 99}
        return asked, transcript("completions", *(completed(text, ids) for text, ids in pieces))
    events, text, ids = [], "", list[int]()
    for more, new in pieces:
        text, ids = text + more, ids + new
        events.append(generated(text, ids, len(ids)) if shape == "whole" else generated(more, new, len(ids)))
    return {"input_ids": [1]}, transcript("generate", *events)


@pytest.mark.parametrize("shape", ["completions", "whole", "pieces"])
@pytest.mark.parametrize("name", [*HALVES, *WHOLES])
def test_ids_that_were_sent_without_their_text_cannot_go_on(name: str, shape: str) -> None:
    """Handed on, the new worker takes them for said, and their character is never seen."""
    if name in HALVES:
        with pytest.raises(CannotContinue, match="half said"):
            rest_of(*by_ids(HALVES[name], shape))
    else:
        assert rest_of(*by_ids(WHOLES[name], shape))


def test_a_half_character_is_noticed_however_much_was_not_read() -> None:
    made = Transcript("generate")
    for n in (1, 2, 3, 4):
        made.feed(sse(generated("ab" * 40_000 + "c" * min(n, 3), list(range(n)), n)))
    assert made.whole_text, "some of it was read"
    with pytest.raises(CannotContinue, match="half said"):
        rest_of({"input_ids": [1]}, made)


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


def test_missing_ids_are_noticed() -> None:
    with pytest.raises(CannotContinue, match="missing"):
        rest_of({"text": "x"}, transcript("generate", generated("a", [4], 1), generated("c", [6], 3)))


def test_a_stream_whose_text_is_whole_only_needs_its_end() -> None:
    whole = transcript("chat", said("Hello"), said("", "stop"))
    assert whole.ending(CHAT) == b"data: [DONE]\n\n"
    assert whole.ending(USAGE) is None
    with pytest.raises(CannotContinue, match="usage"):
        rest_of(USAGE, whole, 1)  # nothing is generated past the end
    used = transcript("chat", said("Hello", "stop"), said("") | {"choices": [], "usage": {"prompt_tokens": 3}})
    assert used.ending(USAGE) == b"data: [DONE]\n\n"
    assert used.ending(CHAT | {"return_hidden_states": True}) is None
    assert transcript("chat", said("Hello", "stop"), "[DONE]").ending(CHAT) == b""
    assert HELLO.ending(CHAT) is None


SEVERAL: dict[str, tuple[Stream, dict[str, Any]]] = {
    "prompts": ("completions", {"prompt": ["one", "two"]}),
    "prompts of ids": ("completions", {"prompt": [[1], [2]]}),
    "n": ("completions", {"prompt": "one", "n": 2}),
    "best_of": ("completions", {"prompt": "one", "best_of": 2}),
    "n of chat": ("chat", CHAT | {"n": 2}),
    "texts": ("generate", {"text": ["one", "two"]}),
    "input_ids": ("generate", {"input_ids": [[1], [2]]}),
    "n of sampling": ("generate", {"text": "one", "sampling_params": {"n": 2}}),
    "n of one sampling": ("generate", {"text": ["one"], "sampling_params": [{"n": 2}]}),
}
ONE: dict[str, tuple[Stream, dict[str, Any]]] = {
    "a prompt": ("completions", {"prompt": "one", "n": 1, "best_of": None}),
    "a prompt of ids": ("completions", {"prompt": [1, 2]}),
    "a list of one": ("generate", {"text": ["one"], "sampling_params": [{"n": 1}]}),
    "input_ids": ("generate", {"input_ids": [1, 2]}),
    "chat": ("chat", CHAT),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_answers_one_that_is_whole_ends_nothing(name: str) -> None:
    stream, asked = SEVERAL[name]
    event = {"chat": said("x", "stop"), "completions": completed("x", None, "stop")}.get(stream)
    first = transcript(stream, event or generated("x", [1], 1, "length") | {"index": 0})
    assert first.ending(asked) is None
    with pytest.raises(CannotContinue):
        rest_of(asked, first, 1)
    with pytest.raises(CannotContinue, match="several"):
        rest_of({"prompt": ["one", "two"]}, transcript("completions", completed("", None, "stop")))


@pytest.mark.parametrize("name", ONE)
def test_of_one_answer_the_end_is_the_end(name: str) -> None:
    stream, asked = ONE[name]
    event = {"chat": said("x", "stop"), "completions": completed("x", None, "stop")}.get(stream)
    assert transcript(stream, event or generated("x", [1], 1, "length")).ending(asked) == b"data: [DONE]\n\n"


BROKEN = {
    "no UTF-8": b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"\xff"}}]}\n\n',
    "half a character": b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"\\ud800"}}]}\n\n',
    "a depth": b"data: " + b'{"choices":' + b"[" * 100_000 + b"\n\n",
    "a depth that closes": b'data: {"choices":[],"x":' + b"[" * 990 + b"]" * 990 + b"}\n\n",
    "a long number": b"data: " + b"1" * 5000 + b"\n\n",
    "a large number": b'data: {"id":"a","choices":[],"usage":{"prompt_tokens":1e999,"completion_tokens":2e999}}\n\n',
    "a text of numbers": sse(said("x") | {"choices": [{"index": 0, "delta": {"content": [1]}, "text": 5}]}),
    "a count of text": sse(generated("x", [1], "1")),  # type: ignore[arg-type]
    "ids of text": sse(generated("x", "y", 1)),  # type: ignore[arg-type]
    "choices of text": sse({"choices": "abc", "usage": {"prompt_tokens": "1"}}),
    "a list": sse([1]),
    "nothing": b"data: \n\ndata:\n\n\n\n",
}


@pytest.mark.parametrize("stream", ["chat", "completions", "generate"])
@pytest.mark.parametrize("name", BROKEN)
def test_no_bytes_of_a_worker_raise(name: str, stream: Stream) -> None:
    """It would end the router: they are read in the calls of a connection."""
    made = Transcript(stream)
    for _ in range(2):
        made.feed(BROKEN[name])
        made.feed(sse({"error": "x" * (128 << 10)}))  # so that all before is read
    made.read()
    with pytest.raises(CannotContinue):
        rest_of({}, made)
    so_far = {
        "chat": HELLO,
        "completions": transcript("completions", completed("a", [9])),
        "generate": transcript("generate", generated("a", [4], 1), generated("ab", [4, 5], 2)),
    }[stream]
    assert isinstance(Splice(so_far, 2).translate(BROKEN[name]), bytes)
