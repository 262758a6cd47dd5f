"""What is remembered of a stream while it passes: the same however it comes, bounded, in whole events."""

from typing import Any

import pytest

from kvd.router.continuation import CannotContinue, rest_of
from kvd.router.proxy.endpoints import Stream
from kvd.router.proxy.events import WholeEvents
from kvd.router.transcript import Transcript
from tests.said_events import generated, said, sse, transcript

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
        rest_of({"model": "m", "stream": True, "messages": []}, made)


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
