"""A chat request as SGLang 0.5.23 hands it to its template: messages, tools, variables. Pure.

The worker parses the body into models and dumps those again, so fields it does not know vanish, fields it knows appear
as None, and orders change: all of that is seen by templates that print JSON, and is done here. Then contents are
flattened or cleaned for the template, tool calls' arguments parsed, and a last assistant message is taken apart.

Raises NoTokens where the worker would refuse, or where the tokens would depend on what is not known here. The body is
never changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from kvd.router.tokens.outcome import NoTokens, Why
from kvd.router.tokens.template import ChatTemplate, Message
from kvd.router.tokens.toolschema import dumped_tools
from kvd.router.tokens.values import as_read, exactly

_ROLES: Final = frozenset({"system", "assistant", "tool", "function", "developer", "latest_reminder", "root"})
_PLAIN_ROLES: Final = _ROLES | {"user"}
_TOOL_ROLES: Final = ("root", "system", "developer")
_MEDIA_PARTS: Final = frozenset({"image_url", "video_url", "audio_url", "input_audio", "input_image"})
_EFFORTS: Final = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max"})
# Parameters of apply_chat_template itself: a request that sets them asks for something else than its own template.
_RESERVED: Final = frozenset(
    {"chat_template", "conversation", "messages", "tools", "tokenize", "add_generation_prompt", "padding",
     "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
     "continue_final_message"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chat:
    """What the template gets. `prefix`: text of the assistant's that the answer goes on from, encoded by itself."""

    messages: list[Message]
    tools: list[Message] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""


def prepare(
    body: Mapping[str, Any], template: ChatTemplate, defaults: Mapping[str, Any], effort_among_variables: bool = True
) -> Chat:
    """From the body of /v1/chat/completions; `defaults` are the worker's default template variables.

    `effort_among_variables`: whether a reasoning_effort in chat_template_kwargs is taken for the request's own.
    """
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise NoTokens(Why.INVALID, "messages is no list, or an empty one")
    dumped = [message if _plain(message) else _dumped(message) for message in given]
    tools = _offered(body, dumped)
    variables = _variables(body, defaults, template, effort_among_variables)
    shaped = [m if type(m["content"]) is str else _shaped(m, template.content) for m in dumped]
    goes_on = exactly(body.get("continue_final_message"), bool, "continue_final_message")
    messages, prefix = _last_turn(shaped, bool(goes_on))
    return Chat(messages, tools, variables, prefix)


def _plain(message: Any) -> bool:
    """Whether the message is one that the worker's models leave as it is; nearly all are."""
    return (
        type(message) is dict
        and (*message,) == ("role", "content")
        and type(message["content"]) is str
        and type(message["role"]) is str
        and message["role"] in _PLAIN_ROLES
    )


def _dumped(message: Any) -> Message:
    """The message after the worker's models, arguments of tool calls parsed; fields that are None left out."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise NoTokens(Why.INVALID, "a message has no role")
    role, content = message["role"].lower(), _content(message.get("content"))
    dumped: Message = {"role": role, "content": content}
    if role not in _ROLES:
        if message["role"] != "user" or content is None:
            raise NoTokens(Why.INVALID, f"role {message['role']!r}")
    elif not message.keys() <= dumped.keys():
        dumped |= _more(message, role)
    return dumped


def _more(message: Message, role: str) -> Message:
    """What messages that are not the user's may have besides, in the order of the worker's models."""
    tools = message.get("tools")
    fields = {
        **{name: _text_or_none(message.get(name), name) for name in ("tool_call_id", "name", "phase")},
        "reasoning_content": _text_or_none(message.get("reasoning_content"), "reasoning_content"),
        "tool_calls": _tool_calls(message.get("tool_calls"), role),
        "tools": None if tools is None else dumped_tools(tools),
        "prefix": exactly(message.get("prefix"), bool, "prefix"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _content(content: Any) -> str | list[Message] | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise NoTokens(Why.INVALID, "content is neither text nor a list of parts")
    return [_part(part) for part in content]


def _part(part: Any) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _MEDIA_PARTS:
        raise NoTokens(Why.MULTIMODAL, f"a part of type {kind}")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("thinking", "reasoning"):
        return {"type": kind}  # neither content format keeps it
    if kind == "tool_reference" and isinstance(part.get("name"), str):
        return {"type": kind, "name": part["name"]}
    raise NoTokens(Why.INVALID, f"a part of type {kind!r}")


def _text_or_none(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise NoTokens(Why.INVALID, f"{name} is no text")


def _tool_calls(calls: Any, role: str) -> list[Message] | None:
    if calls is None:
        return None
    if not isinstance(calls, list):
        raise NoTokens(Why.INVALID, "tool_calls is no list")
    return [_tool_call(call, role) for call in calls]


def _tool_call(call: Any, role: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise NoTokens(Why.INVALID, "a tool call has no function")
    arguments = function.get("arguments")
    if role == "assistant" and isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except msgspec.DecodeError as error:
            raise NoTokens(Why.INVALID, f"a tool call's arguments are not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise NoTokens(Why.INVALID, "a tool call's arguments are no JSON object")
    named = {"name": _text_or_none(function.get("name"), "a tool call's name"), "arguments": as_read(arguments)}
    index = exactly(as_read(call.get("index")), int, "a tool call's index")
    return {"id": call.get("id"), "index": index, "type": "function", "function": named}


def _offered(body: Mapping[str, Any], messages: Sequence[Message]) -> list[Message] | None:
    """The tools that the template shows: all, the one that must be called, or none."""
    given, choice = body.get("tools"), body.get("tool_choice")
    more = [message for message in messages if len(message) > len(("role", "content"))]
    in_messages = any(message["role"] in _TOOL_ROLES and message.get("tools") for message in more)
    if choice is None:
        choice = "none" if given is None and not in_messages else "auto"
    tools = dumped_tools(given) if given is not None else []
    if choice == "none" or not (tools or in_messages):
        return None
    if isinstance(choice, Mapping):
        wanted = (choice.get("function") or {}).get("name")
        tools = [tool for tool in tools if tool["function"]["name"] == wanted]
    return tools or None


def _variables(
    body: Mapping[str, Any], defaults: Mapping[str, Any], template: ChatTemplate, effort_among_variables: bool
) -> dict[str, Any]:
    """Template variables: reasoning switches first, what the request or the worker's defaults say over them."""
    told = body.get("chat_template_kwargs")
    wanted: dict[str, Any] = as_read(told) if isinstance(told, dict) else {}
    effort, thinking = _reasoning(body)
    if thinking is not None:
        wanted.setdefault("thinking", thinking)
        wanted.setdefault("enable_thinking", thinking)
    if effort_among_variables:
        told_effort = wanted.pop("reasoning_effort", None)
        effort = effort if told_effort is None else told_effort
    wanted = {**defaults, **wanted}
    if effort is None and defaults:
        effort = wanted.get("reasoning_effort")
    variables = {} if effort is None else {"reasoning_effort": effort}
    variables |= wanted
    if effort == "low" and template.low_effort is None:
        raise NoTokens(Why.UNSUPPORTED, "low effort with a template that has marks of several families")
    if effort == "low" and template.low_effort:
        variables.setdefault("low_effort", True)
    if reserved := _RESERVED & variables.keys():
        raise NoTokens(Why.UNSUPPORTED, f"chat_template_kwargs sets {', '.join(sorted(reserved))}")
    return variables


def _reasoning(body: Mapping[str, Any]) -> tuple[Any, bool | None]:
    """Effort, and whether to think: None where the request says nothing."""
    effort, thinking = body.get("reasoning_effort"), None
    told = body.get("reasoning")
    if isinstance(told, Mapping):
        asked = told.get("effort", None)
        if asked is None:
            asked = told.get("reasoning_effort")
        effort = effort if asked is None else asked
        enabled = told.get("enabled") if told.get("enabled") is not None else told.get("enable", False)
        if isinstance(enabled, str):
            enabled = enabled.strip().lower() in {"1", "true", "yes", "y", "on"}
        thinking = True if enabled else None
    if effort is None:
        return None, thinking
    if isinstance(effort, bool) or not isinstance(effort, str | int | float):
        raise NoTokens(Why.INVALID, f"reasoning_effort {effort!r}")
    if effort not in _EFFORTS:
        try:
            effort = float(effort)
        except (ValueError, OverflowError) as error:
            raise NoTokens(Why.INVALID, f"reasoning_effort {effort!r}") from error
    return effort, effort != "none"


def _shaped(message: Message, form: str) -> Message:
    """The message as the template wants contents: a list of parts, or one text."""
    content = message["content"]
    if content is None:
        return {**message, "content": ""}
    if not isinstance(content, list):
        return message
    texts = [part["text"] for part in content if part["type"] == "text"]
    if form == "string":
        return {**message, "content": " ".join(texts)}
    parts: Any = [part for part in content if part["type"] in ("text", "tool_reference")]
    if message["role"] == "tool" and len(texts) == len(parts):
        parts = " ".join(texts)
    kept = {name: value for name, value in message.items() if name != "content"}
    return {**kept, "content": parts}  # the worker puts it last here


def _last_turn(messages: list[Message], goes_on: bool) -> tuple[list[Message], str]:
    """A last message of the assistant's is a prefix of the answer, or else shown as the user's."""
    last = messages[-1]
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        return messages, ""
    if goes_on:
        return messages[:-1], last["content"]
    return [*messages[:-1], {"role": "user", "content": last["content"]}], ""
