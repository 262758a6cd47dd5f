"""A stream whose worker died goes on elsewhere: what was said so far, and the request that asks for the rest. Pure.

Only where the rest is what the first worker would have said (or would have drawn from the same distribution): the new
worker is given the prompt and all that was generated, so nothing may depend on how it came about. Penalties over
generated tokens, grammars, log probabilities, several choices, tool calls and reasoning do: such a stream ends with an
error event. A field that is not known here is taken to matter.

What was generated is handed over as token ids where both the request and its events carry them (`input_ids` and
`output_ids` of /generate; a `prompt` of ids and `token_ids` of /v1/completions), else as text. Text is cut into tokens
again: the same ids for what a tokenizer would write itself, not always for what a model drew.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from kvd.errors import KvdError
from kvd.router.transcript import STRANGE, Transcript, one_answer, payloads, wants_usage

_encode = msgspec.json.Encoder().encode

_ANY = object()
# Fields that may be there, and with which value; None and absent are always fine. Everything else matters.
_TAGS = dict.fromkeys(
    ("rid", "priority", "extra_key", "cache_salt", "user", "routing_key", "conversation_id", "custom_labels", "model",
     "lora_path", "stream", "stream_options", "log_metrics", "routed_dp_rank", "metadata", "store"), _ANY,
)  # fmt: skip
_SAMPLING = dict.fromkeys(
    ("temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens",
     "spaces_between_special_tokens", "no_stop_trim", "seed", "sampling_seed", "logit_bias"), _ANY,
) | {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}  # fmt: skip
_FIELDS: Mapping[str, Mapping[str, object]] = {
    "generate": _TAGS | dict.fromkeys(("text", "input_ids", "sampling_params"), _ANY) | {"return_logprob": False},
    "sampling_params": _SAMPLING | dict.fromkeys(("max_new_tokens", "min_new_tokens"), _ANY),
    "completions": _TAGS | _SAMPLING | dict.fromkeys(("prompt", "max_tokens", "min_tokens", "return_token_ids"), _ANY),
    "chat": _TAGS | _SAMPLING | {"tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False}
    | dict.fromkeys(
        ("messages", "max_tokens", "max_completion_tokens", "min_tokens", "chat_template_kwargs", "reasoning_effort",
         "separate_reasoning", "stream_reasoning", "continue_final_message"), _ANY,
    ),
}  # fmt: skip
# What a request may generate when it does not say: SGLang 0.5.23, sampling_params.py and openai/protocol.py.
_LIMIT = {"generate": ("max_new_tokens", 128), "completions": ("max_tokens", 16)}
_MOST_HELD = 1 << 20  # bytes of a rest that does not tell how it is to be told: much more than two first events


class CannotContinue(KvdError):
    """The rest would not be the same. The message says what is in the way."""


def rest_of(request: Any, so_far: Transcript, counted: int | None = None) -> dict[str, Any]:
    """The request for what is still to be said. Raises CannotContinue.

    `counted`: tokens of the text so far, where `so_far.tokens` does not say; needed when `needs_count` says so.
    """
    so_far.read()
    if so_far.odd:
        raise CannotContinue(so_far.odd)
    if not isinstance(request, dict):
        raise CannotContinue("the request is not a JSON object")
    _same_whatever_came_before(request, _FIELDS[so_far.stream])
    if so_far.finished:
        raise CannotContinue("only its usage is missing" if one_answer(request) else "several answers")
    if not so_far.text and not so_far.ids:
        return request
    # Ids that were sent but not said: handed on, they are never said; made again, there are too many.
    if (so_far.ids and so_far.half) or so_far.text.endswith("\N{REPLACEMENT CHARACTER}"):
        raise CannotContinue("a character is half said")
    if so_far.stream == "generate":
        return _rest_of_generate(request, so_far)
    tokens = so_far.tokens if so_far.tokens is not None else counted
    if tokens is None and _counts(request):
        raise CannotContinue("how many tokens were said is not known, and the usage is wanted")
    _no_stop_begun(request.get("stop"), so_far.text)
    rest = request | _fewer(request, ("max_tokens", "max_completion_tokens", "min_tokens"), tokens)
    if so_far.stream == "completions":
        rest |= _fewer(
            {"max_tokens": _LIMIT["completions"][1]} | rest, ("max_tokens",), 0 if "max_tokens" in request else tokens
        )
        return rest | {"prompt": _longer(request.get("prompt"), so_far)}
    return rest | _conversation(request, so_far.text)


def needs_count(request: Any, so_far: Transcript) -> bool:
    """Whether the tokens of the text so far must be counted first: a limit depends on them, or the usage.

    Raises CannotContinue where no count would help.
    """
    rest_of(request, so_far, 0)
    limited = so_far.stream == "completions" or any(
        request.get(name) is not None for name in ("max_tokens", "max_completion_tokens", "min_tokens")
    )
    return so_far.tokens is None and bool(so_far.text) and (limited or _counts(request))


def _counts(request: dict[str, Any]) -> bool:
    return wants_usage(request, "include_usage", "continuous_usage_stats")


def _same_whatever_came_before(request: Mapping[str, Any], known: Mapping[str, object]) -> None:
    for name, value in request.items():
        harmless = known.get(name)
        if value is not None and harmless is not _ANY and value != harmless:
            raise CannotContinue(f"the request has {name}")


def _by_ids(request: Mapping[str, Any], so_far: Transcript) -> bool:
    given = request.get("input_ids" if so_far.stream == "generate" else "prompt")
    return so_far.ids is not None and isinstance(given, list) and all(isinstance(one, int) for one in given)


def _rest_of_generate(request: dict[str, Any], so_far: Transcript) -> dict[str, Any]:
    sampling = request.get("sampling_params") or {}
    if not isinstance(sampling, dict):
        raise CannotContinue("several prompts")
    _same_whatever_came_before(sampling, _FIELDS["sampling_params"])
    _no_stop_begun(sampling.get("stop"), so_far.text)
    name, usual = _LIMIT["generate"]
    sampling = {name: usual} | sampling
    sampling |= _fewer(sampling, (name, "min_new_tokens"), so_far.tokens)
    if _by_ids(request, so_far):
        return request | {"sampling_params": sampling, "input_ids": [*request["input_ids"], *(so_far.ids or ())]}
    if not isinstance(request.get("text"), str):
        raise CannotContinue("several prompts, or none")
    return request | {"sampling_params": sampling, "text": request["text"] + so_far.text}


def _longer(prompt: Any, so_far: Transcript) -> Any:
    if isinstance(prompt, str):
        return prompt + so_far.text
    if _by_ids({"prompt": prompt}, so_far):
        return [*prompt, *(so_far.ids or ())]
    raise CannotContinue("several prompts, or ids without `return_token_ids`")


def _conversation(request: Mapping[str, Any], text: str) -> dict[str, Any]:
    """SGLang appends the tokens of a last assistant message to the prompt as they are: serving_chat.py."""
    messages = list(request.get("messages") or ())
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    if last.get("role") == "assistant":
        if not request.get("continue_final_message") or not isinstance(last.get("content"), str):
            raise CannotContinue("the conversation ends with the assistant's words")
        messages[-1] = last | {"content": last["content"] + text}
    else:
        messages.append({"role": "assistant", "content": text})
    return {"messages": messages, "continue_final_message": True}


def _fewer(request: Mapping[str, Any], names: Iterable[str], tokens: int | None) -> dict[str, int]:
    fewer: dict[str, int] = {}
    for name in names:
        if (limit := request.get(name)) is not None:
            if tokens is None or not isinstance(limit, int):
                raise CannotContinue(f"how much of {name} is left is not known")
            least = name.startswith("min")
            if limit <= tokens and not least:  # the worker left just before it said that this is why it ends
                raise CannotContinue(f"nothing is left of {name}")
            fewer[name] = max(limit - tokens, 0)
    return fewer


def _no_stop_begun(stop: Any, text: str) -> None:
    for one in [stop] if isinstance(stop, str) else stop or []:
        if any(text.endswith(one[:n]) for n in range(1, len(one))):
            raise CannotContinue("a stop string may have begun")


class Splice:
    """The new worker's events as the rest of the old stream: same ids, one count, one text.

    Whether each event of /generate repeats the text, one alone does not tell. Where the old stream had only one, the
    first of the rest waits for its second.
    """

    def __init__(self, so_far: Transcript, counted: int | None) -> None:
        self._stream = so_far.stream
        self._head = dict(so_far.head)
        self._text, self._ids = so_far.text, list(so_far.ids or ())
        self._whole_text = so_far.whole_text
        self._tokens = so_far.tokens if so_far.tokens is not None else counted  # None: nobody asked
        untold = so_far.stream == "generate" and so_far.whole_text is None and bool(so_far.text or so_far.ids)
        self._rest = Transcript("generate") if untold else None  # until it tells
        self._held = bytearray()

    def translate(self, events: bytes, whole: bool = False) -> bytes:
        """Whole events in, whole events out. What is not understood is passed as it is: it cannot be made better.

        `whole`: no more will come. Raises CannotContinue where it never becomes clear how the rest is to be told.
        """
        if self._rest is not None:
            self._held += events
            self._rest.feed(events)
            self._rest.read()
            if self._rest.whole_text is None:
                if self._rest.odd:
                    raise CannotContinue(self._rest.odd)
                if whole or self._rest.finished or self._rest.done or len(self._held) > _MOST_HELD:
                    raise CannotContinue("one event does not tell whether each repeats the text")
                return b""
            events, self._whole_text, self._rest = bytes(self._held), self._rest.whole_text, None
        return b"".join(self._event(data) for data in payloads(events))

    def _event(self, data: bytes) -> bytes:
        try:
            event = json.loads(data)
            shown = self._generated(event) if self._stream == "generate" else self._choices(event)
            return b"data: %b\n\n" % _encode(event) if shown else b""
        except STRANGE:
            return b"data: %b\n\n" % data

    def _generated(self, event: dict[str, Any]) -> bool:
        meta = event["meta_info"]
        meta["id"] = self._head.get("id", meta["id"])
        meta["prompt_tokens"] -= self._tokens or 0
        meta["completion_tokens"] += self._tokens or 0
        if self._whole_text:
            event["text"], event["output_ids"] = self._text + event["text"], self._ids + event["output_ids"]
        return True

    def _choices(self, event: dict[str, Any]) -> bool:
        event |= {name: value for name, value in self._head.items() if name in event}
        if usage := event.get("usage"):
            if self._tokens is None:  # a worker that says it unasked
                del event["usage"]
                return bool(event["choices"])
            usage["prompt_tokens"] -= self._tokens
            usage["completion_tokens"] += self._tokens
        for choice in event["choices"]:
            if self._tokens != 0:  # the rest's own prompt; the client's was told before
                choice.pop("prompt_token_ids", None)
            delta = choice.get("delta")
            if not self._head or not delta:
                continue
            if delta.pop("role", None) and not any(delta.values()) and not choice.get("finish_reason"):
                return False  # the message was opened long ago
        return True
