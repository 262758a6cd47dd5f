"""Settings out of a program's file and environment: what all programs do alike. Its classes are the program's own.

Later ones win: defaults, a TOML file, the environment, what the command line gives. Unknown keys and variables are
refused; variables of another program of ours, whose prefix is longer, are its own business.
"""

import json
import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import BaseSettings
from pydantic_settings import SettingsError as NotJson

from kvd.errors import SettingsError

NODE: Final = "KVD_"
ROUTER: Final = "KVD_ROUTER_"
_PREFIXES: Final = (NODE, ROUTER)
_OF_TOOLS: Final = frozenset({"KVD_ROUTER_URL", "KVD_ROUTER_KEY"})  # how kvdctl finds the router
_NONE: Final[Mapping[str, Any]] = {}
_KINDS: Final = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}  # by how pydantic's errors begin

T = TypeVar("T", bound=BaseSettings)


def load(
    model: type[T], prefix: str, file: Path | None, environ: Mapping[str, str], given: Mapping[str, Any] = _NONE
) -> T:
    """The model, whose `env_prefix` is `prefix`. `file`: None for none. Raises SettingsError naming all that is wrong
    and the remedy."""
    values = read_toml(file) if file is not None else {}
    known = variables(model, prefix)
    others = tuple(other for other in _PREFIXES if other != prefix and other.startswith(prefix))
    theirs = tuple(name for name in environ if name.startswith(prefix) and not name.startswith(others))
    if unknown := sorted(set(theirs) - known.keys() - _OF_TOOLS):
        raise SettingsError(
            f"unknown environment variable {', '.join(unknown)}", f"known are {', '.join(sorted(known))}"
        )
    named = known.keys() & environ.keys()
    for name in named:
        _drop(values, name.removeprefix(prefix).lower().split("__"))  # the environment wins over the file
    for name, value in given.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
    try:
        return model(**values)
    except NotJson as error:  # of a variable that holds a list; it says which field, but not of which part
        lists = [
            name
            for name in sorted(named)
            if get_origin(known[name]) in (list, tuple, dict) and not _is_json(environ[name])
        ]
        raise SettingsError(
            f"{', '.join(lists) or error}: a list is given as JSON",
            f"for instance {(lists or [f'{prefix}...'])[0]}='[\"http://127.0.0.1:30000\"]'",
        ) from error
    except ValidationError as error:
        settings = [name.removeprefix(prefix).lower().replace("__", ".") for name in known]
        wrong: list[str] = []
        for one in error.errors():
            path = [str(part) for part in one["loc"]]
            variable = f"{prefix}{'__'.join(path)}".upper()
            where = variable if variable in named and path[0] not in given else ".".join(path)
            wrong.append(f"{where}: {_wrong(one, settings)}" if where else _wrong(one, settings))
        source = f"{file} or the environment" if file else "the environment or the command line"
        raise SettingsError("; ".join(wrong), f"correct {'it' if len(wrong) == 1 else 'them'} in {source}") from error


def _wrong(error: ErrorDetails, settings: Collection[str]) -> str:
    """What pydantic found, in our words. `settings`: by their full names."""
    kind, given = error["type"], error["input"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    if kind == "missing":
        return "it is needed"
    if kind == "extra_forbidden":
        name = ".".join(str(part) for part in error["loc"])
        sections = {one.partition(".")[0] for one in settings}
        meant = get_close_matches(name, [*settings, *sections], 1, 0.8)
        meant = meant or [one for one in settings if one.endswith(f".{error['loc'][-1]}")]
        return "no such setting" + (f", did you mean {meant[0]}?" if meant else "")
    wanted = _KINDS.get(kind.partition("_")[0]) or error["msg"].removeprefix("Input should be ")
    shown = f", not {given!r:.60}" if isinstance(given, str | int | float) else ""
    return f"must be {wanted}{shown}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def read(file: Path, setting: str = "") -> bytes:
    """`setting`: which names the file. Raises SettingsError."""
    try:
        return file.read_bytes()
    except OSError as error:
        what = f"{setting}: " if setting else ""
        raise SettingsError(
            f"{what}cannot read {file}: {error.strerror}", "check the path and its permissions"
        ) from error


def read_toml(file: Path, setting: str = "") -> dict[str, Any]:
    """Raises SettingsError."""
    try:
        return tomllib.loads(read(file, setting).decode())
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


def variables(model: type[BaseModel], prefix: str) -> dict[str, Any]:
    """The types of all environment variables that the model knows, by name."""
    names: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names |= {f"{prefix}{name}__{key}".upper(): part.annotation for key, part in inner.model_fields.items()}
        else:
            names[f"{prefix}{name}".upper()] = inner
    return names


def _drop(values: dict[str, Any], path: list[str]) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        if not isinstance(inner, dict):
            return
        values = inner
    values.pop(path[-1], None)
