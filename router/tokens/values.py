"""Values of a body as the worker reads them: its JSON reader makes some numbers others, its models some values. Pure.

Only what reaches a template as it was sent is put through here: arguments of tool calls, schemas of tools, variables.
"""

from typing import Any, Final

from kvd.router.tokens.outcome import NoTokens, Why

_LEAST: Final = -(1 << 63)
_BEYOND: Final = 1 << 64


def as_read(value: Any) -> Any:
    """The value as orjson reads it, which knows integers of 64 bits: those beyond become floats. A copy."""
    kind = type(value)
    if kind is dict:
        return {name: as_read(each) for name, each in value.items()}
    if kind is list:
        return [as_read(each) for each in value]
    if kind is not int or _LEAST <= value < _BEYOND:
        return value
    try:
        return float(value)
    except OverflowError as error:
        raise NoTokens(Why.INVALID, "an integer beyond what a float can be") from error


def exactly(value: Any, kind: type, name: str) -> Any:
    """The value of an optional field; pydantic takes others ("true", 1.0) for one of the kind, by rules of its own."""
    if value is None or type(value) is kind:
        return value
    raise NoTokens(Why.UNSUPPORTED, f"{name} is given as {type(value).__name__}, not {kind.__name__}")
