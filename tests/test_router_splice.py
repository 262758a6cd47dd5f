"""The rest of a stream, from another worker, as the same stream goes on: ids, counts, texts, and where it cannot."""

import pytest

from kvd.router.continuation import CannotContinue, Splice, rest_of
from kvd.router.proxy.streamed import Streamed
from tests.said_events import HELLO, completed, generated, plain, said, sse, transcript

REST = {  # of a stream that said "a": as workers say it that repeat the text, and that do not
    "whole": ([generated("b", [5], 1), generated("bc", [5, 6], 2)], ["ab", "abc"], [[4, 5], [4, 5, 6]]),
    "pieces": ([generated("b", [5], 1), generated("c", [6], 2)], ["b", "c"], [[5], [6]]),
}


@pytest.mark.parametrize("shape", REST)
def test_after_one_event_of_generate_the_rest_tells_whether_each_repeats_the_text(shape: str) -> None:
    events, texts, ids = REST[shape]
    so_far = transcript("generate", generated("a", [4], 1))
    assert rest_of({"text": "x"}, so_far)["text"] == "xa"
    splice = Splice(so_far, None)
    assert splice.translate(sse(events[0])) == b"", "it alone does not tell"
    seen = plain(splice.translate(sse(events[1])))
    assert [event["text"] for event in seen] == texts
    assert [event["output_ids"] for event in seen] == ids
    assert [event["meta_info"]["completion_tokens"] for event in seen] == [2, 3]
    again = plain(Splice(so_far, None).translate(sse(*events)))
    assert again == seen, "however it was cut"


@pytest.mark.parametrize(
    "rest",
    [
        sse(generated("b", [5], 1, "length")), sse(generated("b", [5], 1), "[DONE]"),
        sse(generated("b", [5], 1)) + b": still here\n\n" * 100_000, None,
    ],
    ids=["finished", "done", "endless", "cut"],
)  # fmt: skip
def test_a_rest_of_one_event_does_not_tell_enough(rest: bytes | None) -> None:
    splice = Splice(transcript("generate", generated("a", [4], 1)), None)
    with pytest.raises(CannotContinue, match="one event"):
        splice.translate(rest if rest is not None else sse(generated("b", [5], 1)), whole=rest is None)


def test_what_is_wrong_with_a_rest_that_waits_is_said() -> None:
    splice = Splice(transcript("generate", generated("a", [4], 1)), None)
    assert splice.translate(sse(generated("b", [5], 1))) == b""
    with pytest.raises(CannotContinue, match="an error"):
        splice.translate(sse({"error": {"message": "out of memory"}}))


def test_a_first_event_of_text_without_ids_waits_too() -> None:
    splice = Splice(transcript("generate", generated("a", [], 0)), None)
    assert splice.translate(sse(generated("b", [5], 1))) == b""
    seen = plain(splice.translate(sse(generated("bc", [5, 6], 2))))
    assert [event["text"] for event in seen] == ["ab", "abc"]


def test_the_prompts_ids_are_told_once() -> None:
    splice = Splice(transcript("completions", completed("a", [9], prompt_token_ids=[7, 8])), None)
    assert plain(splice.translate(sse(completed("b", [10], prompt_token_ids=[7, 8, 9])))) == [completed("b", [10])]
    again = Splice(transcript("completions"), None)
    first = completed("a", [9], prompt_token_ids=[7, 8])
    assert plain(again.translate(sse(first))) == [first], "nothing was told before"


def test_a_stream_that_begins_at_another_worker_begins_whole() -> None:
    opening = said("", role="assistant")
    assert plain(Splice(transcript("chat"), None).translate(sse(opening))) == [opening]
    assert not Splice(transcript("chat", opening), None).translate(sse(opening))


def test_a_usage_that_cannot_be_right_is_not_told() -> None:
    """A worker may say it unasked; nobody counted then."""
    usage = {"prompt_tokens": 12, "completion_tokens": 3}
    last = said("") | {"choices": [], "usage": usage}
    assert plain(Splice(HELLO, None).translate(sse(said("b") | {"usage": usage}, last, "[DONE]"))) == [
        said("b"),
        "[DONE]",
    ]


def test_a_rest_with_an_endless_event_ends_between_two_events() -> None:
    passed = Streamed("generate")
    passed.take(sse(generated("a", [4], 1), generated("ab", [4, 5], 2)), False)
    passed.go_on({"text": "x"}, None)
    large = sse(generated("c" * (3 << 20), [6], 1))
    with pytest.raises(CannotContinue, match="too long"):
        passed.take(large[: 2 << 20], False)
    assert not passed.inside, "the client has no piece of it"


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
