"""Settings out of a program's file and environment: what all programs do alike. Its classes are the program's own.

Later ones win: defaults, a TOML file, the environment, what the command line gives. Unknown keys and variables are
refused; variables of another program of ours, whose prefix is longer, are its own business.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings
from pydantic_settings import SettingsError as NotJson

from kvd.errors import SettingsError

NODE: Final = "KVD_"
ROUTER: Final = "KVD_ROUTER_"
_PREFIXES: Final = (NODE, ROUTER)
_OF_TOOLS: Final = frozenset({"KVD_ROUTER_URL", "KVD_ROUTER_KEY"})  # how kvdctl finds the router
_NONE: Final[Mapping[str, Any]] = {}

T = TypeVar("T", bound=BaseSettings)


def load(
    model: type[T], prefix: str, file: Path | None, environ: Mapping[str, str], given: Mapping[str, Any] = _NONE
) -> T:
    """The model, whose `env_prefix` is `prefix`. `file`: None for none. Raises SettingsError naming key and remedy."""
    values = read_toml(file) if file is not None else {}
    known = variables(model, prefix)
    others = tuple(other for other in _PREFIXES if other != prefix and other.startswith(prefix))
    for name in environ:
        if name.startswith(prefix) and name not in known | _OF_TOOLS and not name.startswith(others):
            raise SettingsError(f"unknown environment variable {name}", f"known are {', '.join(sorted(known))}")
    for name in known & environ.keys():
        _drop(values, name.removeprefix(prefix).lower().split("__"))  # the environment wins over the file
    for name, value in given.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
    try:
        return model(**values)
    except NotJson as error:  # of a variable that holds a list
        raise SettingsError(f"{error}", f"lists are JSON: {prefix}...='[\"http://127.0.0.1:30000\"]'") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        source = f"{file} or the environment" if file else "the environment or the command line"
        raise SettingsError(f"{where}: {first['msg']}", f"correct it in {source}") from error


def read(file: Path) -> bytes:
    """Raises SettingsError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {file}: {error.strerror}", "check the path and its permissions") from error


def read_toml(file: Path) -> dict[str, Any]:
    """Raises SettingsError."""
    try:
        return tomllib.loads(read(file).decode())
    except ValueError as error:  # of the encoding too
        raise SettingsError(f"{file} is not TOML: {error}", "fix that line") from error


def described(model: type[BaseModel], shown: Mapping[str, str] = _NONE) -> list[str]:
    """The lines of an example file: every setting with its default and what it does, commented out, parts of it as
    sections; of a list of tables one of them. `shown`: what stands for a default that is another's to say. Tables with
    names of the operator's choice are left out."""
    lines: list[str] = []
    sections: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            sections += [f"[{name}]", "", *described(inner, shown)]
        elif get_origin(inner) is list and issubclass(part := get_args(inner)[0], BaseModel):
            sections += [f"# {field.description}", f"# [[{name}]]", "", *described(part, shown)]
        elif get_origin(inner) is not dict:
            default = shown.get(name) or _as_toml(field.default, inner)
            lines += [f"# {field.description}", f"# {name} = {default}", ""]
    return lines + sections


def _as_toml(default: Any, annotation: Any) -> str:
    if default is PydanticUndefined:
        return "..."
    if default is None:
        return '""' if annotation in (Path | None, str | None) else "..."
    if isinstance(default, list | tuple):
        return "[]"
    return f'"{default}"' if isinstance(default, str) else str(default).lower()


def variables(model: type[BaseModel], prefix: str) -> set[str]:
    """The names of all environment variables that the model knows."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names |= {f"{prefix}{name}__{key}".upper() for key in inner.model_fields}
        else:
            names.add(f"{prefix}{name}".upper())
    return names


def _drop(values: dict[str, Any], path: list[str]) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        if not isinstance(inner, dict):
            return
        values = inner
    values.pop(path[-1], None)
