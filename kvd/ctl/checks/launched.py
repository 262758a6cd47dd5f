"""What a process was launched with: is it a server with kvd's plugin, and what settings did the plugin get?

SGLang takes the plugin's settings as JSON on the command line, or as "@file" in JSON, TOML or YAML. The file is named
by somebody else's process, so it is not trusted: only a regular file is read, up to a limit. Never raises: what cannot
be read or understood belongs to no server of ours. A file that was changed since says what the next start will do.
"""

import json
import os
import stat
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

from kvd.errors import UNDECODABLE

MARK = "kvd.sidecar.hicache"
_FLAG = "--hicache-storage-backend-extra-config"
_MOST_BYTES = 64 << 10
_LAUNCHERS = ("bash", "sh", "dash", "zsh", "fish", "sudo", "su", "tmux", "screen", "docker", "podman", "srun", "ssh")
_READERS = ("grep", "rg", "pgrep", "vim", "vi", "nano", "less", "journalctl", "kvdctl")


def plugin_settings(cmdline: list[str], cwd: Callable[[], str]) -> dict[str, Any] | None:
    """What is under "kvd", empty where it cannot be told; None when this is no server with the plugin."""
    if not cmdline or Path(cmdline[0]).name.lstrip("-") in _LAUNCHERS + _READERS:
        return None
    marked = [argument for argument in cmdline if MARK in argument]
    if marked:
        found = (_under_kvd(_parsed(".json", argument[argument.find("{") :])) for argument in marked)
        return next(filter(None, found), {})
    name = _file(cmdline)
    given = _read(name, cwd) if name else {}
    return _under_kvd(given) if given.get("module_path") == MARK else None


def _file(cmdline: list[str]) -> str:
    """The file that holds the settings, empty if there is none. Of several flags SGLang takes the last."""
    value = ""
    for argument, following in pairwise([*cmdline, ""]):
        if argument == _FLAG:
            value = following
        elif argument.startswith(f"{_FLAG}="):
            value = argument.removeprefix(f"{_FLAG}=")
    return value[1:] if value.startswith("@") else ""


def _read(name: str, cwd: Callable[[], str]) -> dict[str, Any]:
    """The file's content; empty when it cannot be had."""
    try:
        path = name if os.path.isabs(name) else os.path.join(cwd(), name)
        with open(path, "rb", opener=_open) as file:
            content = file.read(_MOST_BYTES + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
        if len(content) > _MOST_BYTES:
            return {}
        return _parsed(os.path.splitext(name)[1].lower(), content.decode())
    except (psutil.Error, OSError, ValueError):
        return {}


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # a pipe must not keep us waiting


def _parsed(kind: str, text: str) -> dict[str, Any]:
    """By SGLang's rule: the ending tells the format. Empty for what is malformed, or no table."""
    try:
        if kind == ".json":
            given = json.loads(text)
        elif kind == ".toml":
            given = tomllib.loads(text)
        elif kind in (".yaml", ".yml"):
            given = yaml.safe_load(text)
        else:
            return {}
    except (*UNDECODABLE, yaml.YAMLError):
        return {}
    return given if isinstance(given, dict) else {}


def _under_kvd(given: dict[str, Any]) -> dict[str, Any]:
    inner = given.get("kvd")
    return inner if isinstance(inner, dict) else {}
