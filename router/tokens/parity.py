"""Does a worker make the same tokens, and name the same blocks? Canaries, and what follows from their answers. Pure.

A worker's state is *unknown* until every canary was answered, *equal* while all answers are ours, and *differs* from
the first that is not, with what and where. Only an equal worker gets prefix credit. One that could not be asked keeps
the state it had until that is too old to be believed.

    ask      POST /tokenize of each canary's body            -> Parity.heard, or Parity.unheard
    events   hashes of a request that the worker announced   -> Parity.announced
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

State = Literal["unknown", "equal", "differs"]
OLD_AFTER_S: Final = 900.0  # three rounds of PROBE_EVERY_S
PROBE_EVERY_S: Final = 300.0
SHOWN: Final = 6  # ids around the first that differs
EVENTS: Final = "block hashes"

_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Weather of a city, in \u00b0C", "strict": True,
        "parameters": {
            "type": "object", "required": ["city"],
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1, "enum": [1, 3, 7]}},
        },
    },
}  # fmt: skip
_CALL: Final = {"name": "get_weather", "arguments": '{"city": "K\u00f6ln", "days": 3}'}
_UNICODE: Final = (
    "na\u00efve Stra\u00dfe \u4f60\u597d\u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \u05e9\u05dc\u05d5\u05dd "
    "\U0001f469\u200d\U0001f680 e\u0301 \ufb01 \u00bd\u3000\u200b\r\n\t12345678 don't  x=[1,2];\n\n\n    pass"
)


@dataclass(frozen=True, slots=True)
class Canary:
    """A body for /tokenize. Chats are what /v1/chat/completions would get."""

    name: str
    body: Mapping[str, Any]

    @property
    def chat(self) -> bool:
        return "messages" in self.body


def canaries(special_tokens: Sequence[str]) -> list[Canary]:
    """What every worker is asked; `special_tokens` are the model's own, in text."""
    special = "".join(f"{token} a{token}\n" for token in special_tokens)
    user, assistant = {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": " It is 4. "}
    history = [
        {"role": "system", "content": "You are terse."}, {"role": "user", "content": _UNICODE},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": _CALL}]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"c": 21.5}'}, {"role": "user", "content": "And tomorrow?"},
    ]  # fmt: skip
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    return [
        Canary("plain text", {"prompt": "The quick brown fox jumps over the lazy dog."}),
        Canary("unicode", {"prompt": _UNICODE}),
        Canary("special tokens", {"prompt": special}),
        Canary("chat", {"messages": [user]}),
        Canary("chat of several turns", {"messages": [user, assistant, {"role": "user", "content": "Why?"}]}),
        Canary("chat with tools", {"messages": history, "tools": [_TOOL]}),
        Canary("chat with parts", {"messages": [{"role": "user", "content": parts}]}),
        Canary("chat to be continued", {"messages": [user, assistant], "continue_final_message": True}),
        Canary("chat without reasoning", {"messages": [user], "reasoning_effort": "none"}),
    ]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a worker, for routing, metrics and `kvdctl doctor`."""

    state: State
    what: str = ""  # the canary that differs, or why nothing is known
    where: str = ""  # the first difference
    remedy: str = ""
    since_s: float = 0.0  # on the router's clock
    unsure: Sequence[str] = ()  # canaries that we have no tokens for: such requests get no credit anyway

    @property
    def credit(self) -> bool:
        return self.state == "equal"


class Parity:
    """One worker's. Each canary counts by its last answer; so do the hashes of its events."""

    def __init__(self, expected: Mapping[str, Sequence[int] | None]) -> None:
        """Our ids by canary; None where we have none, so that it cannot be compared."""
        self._expected = expected
        self._differs: dict[str, Verdict] = {}
        self._heard: dict[str, float] = {}
        self._failure = "not asked yet"

    def heard(self, name: str, ids: Sequence[int], now: float) -> None:
        """The worker's ids of a canary."""
        expected = self._expected[name]
        self._heard[name] = now
        self._differs.pop(name, None)
        if expected is not None and list(expected) != list(ids):
            remedy = _TEXT_REMEDY if not name.startswith("chat") else _CHAT_REMEDY
            self._differs[name] = Verdict("differs", name, difference(expected, ids), remedy, now)

    def unheard(self, failure: str) -> None:
        """The worker did not answer, or not with ids."""
        self._failure = failure

    def announced(self, ours: Sequence[int], theirs: Sequence[int], now: float) -> None:
        """Block hashes of one request: as we make them, and as the worker's event had them."""
        self._differs.pop(EVENTS, None)
        if list(ours) != list(theirs):
            self._differs[EVENTS] = Verdict("differs", EVENTS, difference(ours, theirs), _EVENT_REMEDY, now)

    def verdict(self, now: float) -> Verdict:
        """What to believe now."""
        if self._differs:
            return next(iter(self._differs.values()))
        comparable = [name for name, ids in self._expected.items() if ids is not None]
        unsure = tuple(name for name, ids in self._expected.items() if ids is None)
        if not comparable:
            return Verdict("unknown", "there is no canary that we have tokens for", remedy=_NO_TOKENS, unsure=unsure)
        missing = [name for name in comparable if now - self._heard.get(name, -OLD_AFTER_S) >= OLD_AFTER_S]
        if missing:
            what = f"no answer to {missing[0]!r}: {self._failure}"
            return Verdict("unknown", what, remedy=_ASK_REMEDY, unsure=unsure)
        return Verdict("equal", since_s=min(self._heard[name] for name in comparable), unsure=unsure)


def difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two lists part, and what they have there."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((n for n, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    return f"from {at}: {list(ours[at : at + SHOWN])} here, {list(theirs[at : at + SHOWN])} there"


_TEXT_REMEDY: Final = (
    "tokenizer.json differs: is model_path the very folder that the worker serves? where workers serve several models "
    "unset it, so that each worker's own folder is used"
)
_CHAT_REMEDY: Final = "compare the chat template and its options: the folder's against the worker's command line"
_EVENT_REMEDY: Final = (
    "compare page size and event format in the worker's /server_info; a speculative one hashes pairs"
)
_ASK_REMEDY: Final = "see whether the worker serves POST /tokenize, and whether the router's API key for it is right"
_NO_TOKENS: Final = "see the router's log for why this model's prompts cannot be made here"
