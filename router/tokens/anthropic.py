"""An Anthropic Messages request as the chat request that SGLang 0.5.23 makes of it. Pure.

Only what changes the prompt is carried over. Thinking that an assistant message repeats is refused, because it is
written with the reasoning parser's own words; so is a request to switch thinking, which goes through that parser too.
"""

import json
from collections.abc import Mapping
from typing import Any

from kvd.router.tokens.outcome import NoTokens, Why

Body = dict[str, Any]


def as_chat(body: Mapping[str, Any], inline_system: bool) -> Body:
    """`inline_system`: whether the template takes system messages where they stand; else all go to the front."""
    messages: list[Body] = []
    system = _system(body, inline_system)
    if system:
        messages.append({"role": "system", "content": "\n".join(system)})
    for message in _listed(body.get("messages"), "messages"):
        if not isinstance(message, Mapping):
            raise NoTokens(Why.INVALID, "a message is no object")
        if message.get("role") != "system" or inline_system:
            messages += _converted(message)
    chat: Body = {"messages": messages}
    if body.get("thinking") is not None:
        raise NoTokens(Why.UNSUPPORTED, "thinking goes through the worker's reasoning parser")
    effort = (body.get("output_config") or {}).get("effort")
    if effort is not None:
        # Set on a request that was checked before: no thinking switch follows from it.
        chat["chat_template_kwargs"] = {"reasoning_effort": "max" if effort == "xhigh" else effort}
    tools = [_tool(tool) for tool in _listed(body.get("tools") or [], "tools") if not _of_the_servers(tool)]
    if tools:
        chat["tools"] = tools
    chat["tool_choice"] = _choice(body.get("tool_choice"), bool(tools))
    return chat


def _system(body: Mapping[str, Any], inline_system: bool) -> list[str]:
    given = body.get("system") or []
    if isinstance(given, str):
        parts = [given] if given.strip() else []
    else:
        parts = [part["text"] for part in given if part.get("type") == "text" and part.get("text")]
    if not inline_system:
        for message in _listed(body.get("messages"), "messages"):
            if isinstance(message, Mapping) and message.get("role") == "system":
                content = message.get("content")
                blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
                texts = [str(block.get("text", "")).strip() for block in blocks if block.get("type") == "text"]
                parts += ["\n".join(filter(None, texts))] if any(texts) else []
    return parts


def _converted(message: Mapping[str, Any]) -> list[Body]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise NoTokens(Why.INVALID, f"role {role!r}")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    out: list[Body] = []
    parts: list[Body] = []
    calls: list[Body] = []
    for block in _listed(content, "content"):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            parts.append({"type": "text", "text": block.get("text")})
        elif kind == "search_result":
            if found := _search_result(block):
                parts.append({"type": "text", "text": found})
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {})
            function = {"name": block.get("name") or "", "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            out += _user(parts)
            parts = []
            name = block.get("tool_use_id") or block.get("id") or ""
            out += [{"role": "tool", "tool_call_id": name, "content": each} for each in _results(block.get("content"))]
        elif kind == "tool_result":
            text = _result_text(block.get("content"))
            parts.append({"type": "text", "text": f"Tool result: {text}"})
        elif kind == "image":
            raise NoTokens(Why.MULTIMODAL, "an image block")
        elif kind in ("thinking", "redacted_thinking"):
            raise NoTokens(Why.UNSUPPORTED, "thinking of an earlier turn is written by the worker's reasoning parser")
        elif kind != "tool_reference":
            raise NoTokens(Why.INVALID, f"a block of type {kind!r}")
    if role == "user" and not parts and not calls:
        return out
    last: Body = {"role": role}
    if calls:
        last["tool_calls"] = calls
    if parts:
        last["content"] = parts[0]["text"] if len(parts) == 1 else parts
    elif not calls:
        last["content"] = ""
    return [*out, last]


def _user(parts: list[Body]) -> list[Body]:
    if not parts:
        return []
    return [{"role": "user", "content": parts[0]["text"] if len(parts) == 1 else parts}]


def _results(content: Any) -> list[Any]:
    """A tool's result as contents of tool messages: references to tools apart from all else, in order."""
    if not isinstance(content, list):
        return [str(content) if content else ""]
    groups: list[list[Body]] = []
    for item in content:
        kind = item.get("type")
        if kind == "image":
            raise NoTokens(Why.MULTIMODAL, "an image in a tool's result")
        if kind == "tool_reference":
            name = item.get("tool_name") or item.get("name")
            part: Body | None = {"type": kind, "name": name} if name else None
        else:
            text = item.get("text", "") if kind == "text" else _search_result(item) if kind == "search_result" else ""
            part = {"type": "text", "text": text} if text else None
        if part is None:
            continue
        if groups and (groups[-1][0]["type"] == "tool_reference") == (kind == "tool_reference"):
            groups[-1].append(part)
        else:
            groups.append([part])
    flat = [group[0]["text"] if len(group) == 1 and group[0]["type"] == "text" else group for group in groups]
    return flat or [""]


def _result_text(content: Any) -> str:
    if not isinstance(content, list):
        return str(content) if content else ""
    texts = [
        item.get("text", "") if item.get("type") == "text" else _search_result(item)
        for item in content
        if item.get("type") in ("text", "search_result")
    ]
    return "\n".join(filter(None, texts))


def _search_result(block: Mapping[str, Any]) -> str:
    lines = []
    if title := block.get("title"):
        lines.append(f"Title: {title}")
    source = block.get("source")
    if isinstance(source, Mapping):
        source = source.get("url") or source.get("text")
    if source:
        lines.append(f"Source: {source}")
    texts = [part["text"] for part in block.get("content") or [] if part.get("type") == "text" and part.get("text")]
    if texts:
        lines.append("Content: " + "\n".join(texts))
    return "\n".join(lines)


def _of_the_servers(tool: Any) -> bool:
    """Tools whose implementation is Anthropic's: the worker leaves them out."""
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    return isinstance(kind, str) and kind.startswith(("web_search_", "computer_", "bash_", "text_editor_"))


def _tool(tool: Any) -> Body:
    schema = tool.get("input_schema") if isinstance(tool, Mapping) else None
    if not isinstance(schema, Mapping):
        raise NoTokens(Why.INVALID, "a tool has no input_schema")
    if "type" not in schema:
        schema = {**schema, "type": "object"}
    function = {
        "name": tool.get("name"), "description": tool.get("description") or "", "parameters": schema,
        "strict": tool.get("strict", False),
    }  # fmt: skip
    return {"type": "function", "function": function, "defer_loading": tool.get("defer_loading")}


def _choice(choice: Any, tools: bool) -> Any:
    if choice is None:
        return "auto" if tools else None
    kind = choice.get("type")
    if kind == "none":
        return "none"
    if not tools:
        return None
    named = {"type": "function", "function": {"name": choice.get("name")}}
    return {"auto": "auto", "any": "required", "tool": named}.get(kind)


def _listed(given: Any, name: str) -> list[Any]:
    if not isinstance(given, list):
        raise NoTokens(Why.INVALID, f"{name} is no list")
    return given
