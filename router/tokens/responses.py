"""An OpenAI Responses request as the chat request that SGLang 0.5.23 makes of it. Pure.

A request that goes on from a stored response is refused: only the worker has what was said before.
"""

import json
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, Final

import msgspec

from kvd.router.tokens.outcome import NoTokens, Why

Body = dict[str, Any]
_DEVELOPER: Final = "Developer instructions:"
_BARE_REASONING: Final = {"role", "reasoning_content"}
_JOINED: Final[Mapping[str, Any]] = {  # fields of which a turn has all of its messages', and what says nothing there
    "phase": (None,), "content": (None, ""), "tool_calls": (None, "", [], {}), "reasoning_content": (None, "", [], {}),
}  # fmt: skip


def as_chat(body: Mapping[str, Any], inline_system: bool) -> Body:
    """`inline_system`: whether the template takes system messages where they stand; else all go to the front."""
    if body.get("previous_response_id") is not None:
        raise NoTokens(Why.STATE, "previous_response_id: the worker has the earlier messages")
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise NoTokens(Why.INVALID, "input is neither text nor a list")
    messages = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    messages += [each for each in map(_message, items) if each is not None]
    messages = _merged(messages)
    if not inline_system:
        messages = _system_first(messages)
    tools = [each for each in map(_tool, body.get("tools") or []) if each is not None]
    reasoning = body.get("reasoning")
    chat: Body = {"messages": messages, "tool_choice": _choice(body.get("tool_choice")) if tools else "none"}
    if tools:
        chat["tools"] = tools
    if body.get("chat_template_kwargs") is not None:
        chat["chat_template_kwargs"] = body["chat_template_kwargs"]
    if isinstance(reasoning, Mapping):
        chat["reasoning_effort"] = reasoning.get("effort", "medium")
        if (reasoning.get("effort") or reasoning.get("reasoning_effort")) == "none":
            told = chat.get("chat_template_kwargs")
            off = {"thinking": False, "enable_thinking": False}
            chat["chat_template_kwargs"] = {**off, **(told if isinstance(told, dict) else {})}
    return chat


def _message(item: Any) -> Body | None:
    """One input item as a message; None for one that says nothing."""
    if not isinstance(item, Mapping):
        raise NoTokens(Why.INVALID, "an input item is no object")
    item = {name: value for name, value in item.items() if value is not None}
    if item.get("role") == "developer":
        item = {**item, "role": "system", "content": _labelled(item.get("content"))}
    kind = item.get("type")
    if kind == "function_call":
        return _call(item, item.get("name"), _arguments(item.get("arguments")))
    if kind == "custom_tool_call":
        return _call(item, item.get("name"), json.dumps({"input": item.get("input") or ""}, ensure_ascii=False))
    if kind in ("function_call_output", "custom_tool_call_output"):
        output = item.get("output", "")
        if isinstance(output, list):
            output = "".join(part.get("text", "") for part in output if isinstance(part, Mapping))
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    if kind == "reasoning":
        return _reasoning(item)
    if kind not in (None, "message"):
        raise NoTokens(Why.UNSUPPORTED, f"an input item of type {kind!r}")
    content = item.get("content")
    if isinstance(content, list):
        item = {**item, "content": [_part(part) for part in content]}
    return {name: value for name, value in item.items() if name not in ("id", "status", "type")}


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text", "")}
    return part


def _labelled(content: Any) -> Any:
    """What the developer says keeps a label when it becomes the system's."""
    if isinstance(content, str):
        return f"{_DEVELOPER}\n{content}"
    if not isinstance(content, list):
        return content
    for at, part in enumerate(content):
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            return [*content[:at], {**part, "text": f"{_DEVELOPER}\n{part['text']}"}, *content[at + 1 :]]
    return [{"type": "input_text", "text": _DEVELOPER}, *content]


def _call(item: Mapping[str, Any], name: Any, arguments: str) -> Body:
    function = {"name": name, "arguments": arguments}
    call = {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _arguments(given: Any) -> str:
    """Text of a JSON object; what is not one becomes an empty one."""
    if isinstance(given, Mapping):
        return msgspec.json.encode(given).decode()
    if isinstance(given, str) and given:
        try:
            return given if isinstance(msgspec.json.decode(given), dict) else "{}"
        except msgspec.DecodeError:
            pass
    return "{}"


def _reasoning(item: Mapping[str, Any]) -> Body | None:
    for name in ("summary", "content"):
        texts = [part["text"] for part in item.get(name) or [] if isinstance(part, Mapping) and part.get("text")]
        if texts:
            return {"role": "assistant", "reasoning_content": "\n".join(texts)}
    if item.get("encrypted_content"):
        raise NoTokens(Why.UNSUPPORTED, "reasoning that only its worker's release can read")
    return None


def _merged(messages: list[Body]) -> list[Body]:
    """Consecutive messages of the assistant's are one turn."""
    turns: list[list[Body]] = []
    names: set[str] = set()  # of the fields that the last turn has by now
    phase = None
    for message in messages:
        joins = turns and message.get("role") == turns[-1][0].get("role") == "assistant"
        if joins and (message.get("phase") == phase or names == _BARE_REASONING):
            turns[-1].append(message)
            names |= {name for name, empty in _JOINED.items() if message.get(name) not in empty}
            phase = message["phase"] if message.get("phase") is not None else phase
        else:
            turns.append([message])
            names, phase = set(message), message.get("phase")
    return [turn[0] if len(turn) == 1 else _joined(turn) for turn in turns]


def _joined(turn: list[Body]) -> Body:
    """All at once: one after the other, each would copy all before it."""
    first, *others = turn
    joined = dict(first)
    for phase in [each["phase"] for each in others if each.get("phase") is not None]:
        joined["phase"] = phase
    if any(each.get("content") not in (None, "") for each in others):
        joined["content"] = _one_content([each["content"] for each in turn if each.get("content") not in (None, "")])
    if any(each.get("tool_calls") for each in others):
        joined["tool_calls"] = [call for each in turn for call in each.get("tool_calls") or []]
    if any(each.get("reasoning_content") for each in others):
        thoughts = [each["reasoning_content"] for each in turn if each.get("reasoning_content")]
        joined["reasoning_content"] = thoughts[0] if len(thoughts) == 1 else "\n".join(map(str, thoughts))
    return joined


def _one_content(contents: list[Any]) -> Any:
    texts = list(takewhile(lambda content: isinstance(content, str), contents))
    rest = contents[len(texts) :]
    if not rest:
        return "\n\n".join(texts)
    if len(contents) == 1:
        return rest[0]
    parts = _as_parts("\n\n".join(texts)) if texts else []
    return [*parts, *(part for content in rest for part in _as_parts(content))]


def _as_parts(content: Any) -> list[Any]:
    return list(content) if isinstance(content, list) else [{"type": "text", "text": content}]


def _system_first(messages: list[Body]) -> list[Body]:
    chunks: list[str] = []
    for message in messages:
        if message.get("role") == "system":
            content = message.get("content")
            parts = [{"text": content}] if isinstance(content, str) else content or []
            chunks += [part["text"] for part in parts if isinstance(part.get("text"), str)]
    others = [message for message in messages if message.get("role") != "system"]
    return [{"role": "system", "content": "\n\n".join(chunks)}, *others] if chunks else others


def _tool(tool: Any) -> Body | None:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if kind == "function":
        description, parameters = tool.get("description"), tool.get("parameters")
    elif kind == "custom" and tool.get("name"):
        raise NoTokens(Why.UNSUPPORTED, "a custom tool is offered in words of the worker's release")
    else:
        return None
    function = {
        "name": tool.get("name"), "description": description, "parameters": parameters,
        "strict": tool.get("strict", False), "defer_loading": None,
    }  # fmt: skip
    return {"type": "function", "function": function}


def _choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    name = choice.get("name") or (choice.get("function") or {}).get("name")
    if choice.get("type") not in ("function", "custom") or not name:
        return "auto"
    return {"type": "function", "function": {"name": name}}
