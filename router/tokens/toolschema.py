"""Tools as SGLang's models dump them for a template. Pure.

A template prints a tool as JSON, so that its fields' order counts: a function keeps the order its client sent, fields
the worker knows and the client left out follow as null, and fields the worker does not know are gone.
"""

from collections.abc import Mapping
from typing import Any, Final

from kvd.router.tokens.outcome import NoTokens, Why
from kvd.router.tokens.values import as_read, exactly

Tool = dict[str, Any]
_FIELDS: Final = ("description", "name", "parameters", "strict", "defer_loading")
_TYPES: Final = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_VALUES: Final = frozenset({"enum", "const", "default", "example", "examples"})  # not schemas
_NAMED: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def dumped_tools(tools: Any) -> list[Tool]:
    """Raises NoTokens for what the worker refuses, and for schemas that it rewrites before it shows them."""
    if not isinstance(tools, list):
        raise NoTokens(Why.INVALID, "tools is no list")
    return [_dumped(tool) for tool in tools]


def _dumped(tool: Any) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise NoTokens(Why.INVALID, "a tool has no function with a name")
    deferred = exactly(tool.get("defer_loading"), bool, "defer_loading")
    known: Tool = {name: function.get(name) for name in _FIELDS}
    known["parameters"] = as_read(known["parameters"])
    if known["defer_loading"] is None:
        known["defer_loading"] = deferred
    for optional in ("strict", "defer_loading"):
        if exactly(known[optional], bool, optional) is None:
            del known[optional]
    _check(known["parameters"])
    sent = [name for name in function if name in known]
    ordered = {name: known[name] for name in (*sent, *(name for name in known if name not in sent))}
    return {"type": tool.get("type", "function"), "function": ordered, "defer_loading": deferred}


def _check(schema: Any) -> None:
    """SGLang turns a database's type names ("varchar", "int") into JSON Schema's; which ones is its own affair."""
    if isinstance(schema, list):
        for each in schema:
            _check(each)
    if not isinstance(schema, Mapping):
        return
    kinds = schema.get("type", [])
    listed = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    if len(set(map(str, listed))) != len(listed) or not set(map(str, listed)) <= _TYPES:
        raise NoTokens(Why.UNSUPPORTED, f"a tool's schema has the type {kinds!r}")
    for name, value in schema.items():
        if name in _NAMED and isinstance(value, Mapping):
            _check(list(value.values()))
        elif name not in _VALUES:
            _check(value)
