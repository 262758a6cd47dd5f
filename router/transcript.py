"""What one event stream has said so far: kept as bytes, and read only when somebody wants to know. Pure.

Fed what the client was sent, always in whole events. Most streams end by themselves and are never read at all; of a
long one the oldest events are read a few at a time, so that nobody else's stream waits for it.
Bounded: by bytes that were not read, and by the text.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from kvd.errors import UNDECODABLE
from kvd.router.proxy.endpoints import Stream

_UNREAD_BYTES = 128 << 10  # of one stream; reading costs more than passing on
_AT_ONCE_BYTES = 16 << 10  # 0.3 ms
_MOST = 4 << 20  # characters and ids kept of one stream
_DONE = b"data: [DONE]\n\n"
_decode = msgspec.json.Decoder().decode
# What bytes may raise that are not what they should be: workers break, and nothing they say ends the router.
STRANGE = (*UNDECODABLE, LookupError, TypeError, AttributeError, ArithmeticError)


class Transcript:
    """What one stream has said so far."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.text = ""
        self.ids: list[int] | None = []  # None: its events do not carry them
        self.tokens: int | None = 0  # None: only the text tells
        self.half = False  # there may be ids of a character that the text does not have yet
        self.finished = False  # it said why it ended
        self.done = False  # and that nothing follows
        self.odd = ""  # what makes it impossible to continue
        self.whole_text: bool | None = None  # /generate: each event repeats the text so far; None: not to be told yet
        self.head: dict[str, Any] = {}  # what all its events share
        self._usage = False  # after it was finished, it said what it took
        self._unread: deque[bytes] = deque()
        self._unread_bytes = 0

    def feed(self, events: bytes) -> None:
        """Whole events, as the client was sent them."""
        self._unread.append(events)
        self._unread_bytes += len(events)
        if self._unread_bytes > _UNREAD_BYTES:
            oldest = self._take(_AT_ONCE_BYTES)
            if not (self.whole_text and len(self._unread) > 1):  # else the later ones repeat it; see _read
                self._read(oldest)

    def read(self) -> None:
        """Bring everything else up to date."""
        self._read(self._take(self._unread_bytes))

    def _take(self, size: int) -> bytes:
        """About so many bytes of the oldest events that were not read."""
        taken = []
        left = self._unread_bytes - size
        while self._unread and self._unread_bytes > left:
            taken.append(self._unread.popleft())
            self._unread_bytes -= len(taken[-1])
        return b"".join(taken)

    def _read(self, raw: bytes) -> None:
        said = list(payloads(raw))
        if self.whole_text:  # all is in the last of them; what is new in it the one before tells
            said = said[-2:]
        new: list[str] = []  # joined once: a long text is not copied for each of its words
        for data in said:
            if data == b"[DONE]":
                self.done = True
            elif not self.odd:
                try:
                    self._read_event(_decode(data), new)
                except STRANGE:
                    self.odd = "an event that is not understood"
        self.text += "".join(new)
        if len(self.text) + len(self.ids or ()) > _MOST:
            self.odd, self.text, self.ids = "too long a text", "", None

    def _read_event(self, event: dict[str, Any], new: list[str]) -> None:
        if "error" in event:
            self.odd = "an error"
        elif self.stream == "generate":
            self._read_generated(event, new)
        else:
            self._read_choices(event, new)

    def _read_generated(self, event: dict[str, Any], new: list[str]) -> None:
        meta, ids, text = event["meta_info"], event.get("output_ids"), event["text"]
        self.head.setdefault("id", meta["id"])
        count = meta["completion_tokens"]
        if not (isinstance(ids, list) and isinstance(text, str) and isinstance(count, int)) or event.get("index", 0):
            self.odd = "events without ids, or of several answers"
            return
        if self.tokens and ids:  # from the second event on its length tells
            self.whole_text = len(ids) == count
        if self.whole_text is False and self.tokens:
            new.append(text)
            self.half = _may_be_half(text, len(ids)) if ids else self.half
            self.ids = self.ids or []
            self.ids += ids
        else:
            if (more := count - (self.tokens or 0)) > 0:
                self.half = _may_be_half(text[len(self.text) :], more)
            new.clear()
            self.text, self.ids = text, list(ids)
        if len(self.ids) != count:
            self.odd = "ids that are missing"
        self.tokens, self.finished = count, bool(meta.get("finish_reason"))

    def _read_choices(self, event: dict[str, Any], new: list[str]) -> None:
        for name in ("id", "created", "model", "object"):
            if name in event:
                self.head.setdefault(name, event[name])
        self._usage = self._usage or bool(event.get("usage") and not event["choices"])
        for choice in event["choices"]:
            if choice.get("index", 0):
                self.odd = "several choices"
            delta = choice if self.stream == "completions" else choice["delta"]
            if delta.get("tool_calls") or delta.get("reasoning_content") or choice.get("logprobs"):
                self.odd = "tool calls, reasoning or log probabilities"
            said = delta.get("text" if self.stream == "completions" else "content") or ""
            new.append(_text(said))
            ids = choice.get("token_ids")
            if ids is not None and self.ids is not None:
                self.half = _may_be_half(said, len(ids)) if ids else self.half
                self.ids += ids
            elif said:
                self.ids = None
            self.finished = self.finished or bool(choice.get("finish_reason"))
        self.tokens = None if self.ids is None else len(self.ids)

    def ending(self, request: Any) -> bytes | None:
        """What the client still misses of a stream whose text is complete; None when text is missing."""
        self.read()
        if self.done:
            return b""
        complete = self.finished and not self.odd and one_answer(request) and not self._lacks(request)
        return _DONE if complete else None

    def _lacks(self, request: dict[str, Any]) -> bool:
        """Whether something follows the reason why it ended, as SGLang's OpenAI endpoints have it."""
        if self.stream == "generate":
            return False
        own = any(request[name] for name in request if name.startswith("return_") and name != "return_token_ids")
        return own or (wants_usage(request, "include_usage") and not self._usage)


def one_answer(request: Any) -> bool:
    """Whether one answer to one prompt is asked for, in any of SGLang's bodies."""
    if not isinstance(request, dict) or request.get("input_embeds") is not None:
        return False  # embeddings: one prompt of them looks much like many
    sampling = request.get("sampling_params")
    for each in (request, *(sampling if isinstance(sampling, list) else [sampling])):
        if isinstance(each, dict) and any(each.get(name) not in (1, None) for name in ("n", "best_of")):
            return False
    prompts = [request.get(name) for name in ("text", "input_ids", "prompt")]
    return not any(isinstance(one, list) and len(one) > 1 and not isinstance(one[0], int) for one in prompts)


def wants_usage(request: dict[str, Any], *ways: str) -> bool:
    """In one of these ways of `stream_options`."""
    options = request.get("stream_options")
    return isinstance(options, dict) and any(options.get(way) for way in ways)


def _text(said: object) -> str:
    if not isinstance(said, str):
        raise TypeError("a text that is none")
    return said


def _may_be_half(said: str, ids: int) -> bool:
    """Whether the last of the ids that came with this text may belong to a character that is not whole.

    SGLang sends ids at once, and withholds text from such a character on, back to the last space; it says CJK
    characters before it (detokenizer_manager.py, find_printable_text). One id that brings one of those, or more than a
    space, is taken to be no more than that, and ids whose text ends in anything else to be all of it.
    """
    last = said[-1:]
    cjk = "\u3400" <= last <= "\u9fff" or "\uf900" <= last <= "\ufaff" or last >= "\U00020000"
    several = ids > 1 and (cjk or last == " ")
    return several or said == " " or last in ("", "\N{REPLACEMENT CHARACTER}")


def payloads(events: bytes) -> Iterator[bytes]:
    """What the events carry: the data of each that has any."""
    for event in events.replace(b"\r\n", b"\n").split(b"\n\n"):
        data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if data:
            yield data
