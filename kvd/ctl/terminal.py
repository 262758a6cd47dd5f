"""What all commands share: options, exit codes, the way to the daemon, and how results and errors are shown.

With --json, stdout carries one JSON document or nothing, and an error is one JSON line on stderr.
"""

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from kvd.client import Link
from kvd.ctl.table import laid_out
from kvd.errors import KvdError, Unavailable
from kvd.places import SOCKET, run_dir

FINE, WRONG, NO_DAEMON = 0, 1, 3  # 2 is the command line's own: wrong usage
TIMEOUT_S: Final = 2.0  # a healthy daemon answers in milliseconds

SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        metavar="PATH",
        help="The daemon's socket. By default kvd.sock in $KVD_RUN_DIR; without that in /run/kvd for root, "
        "else in your own $XDG_RUNTIME_DIR/kvd.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def socket_path(given: Path | None) -> Path:
    """Where the daemon should be."""
    return given if given is not None else run_dir(os.environ, os.getuid()) / SOCKET


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Turn what kvd raises on purpose, and output that cannot be written, into one line on stderr and an exit code."""
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # here, where it can still be said that this failed
    except KvdError as error:
        _complain(error, as_json)
        raise typer.Exit(NO_DAEMON if isinstance(error, Unavailable) else WRONG) from error
    except OSError as error:
        if error.filename is not None or error.errno == errno.EPIPE:  # a bug; a reader who has seen enough
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left is written at exit, and would fail once more
        _complain(KvdError(f"cannot write: {error.strerror}", "is there room where it goes?"), as_json)
        raise typer.Exit(WRONG) from error


def _complain(error: KvdError, as_json: bool) -> None:
    if as_json:
        said = {"error": error.message, "hint": error.hint}  # a path of theirs may hold bytes that are no text
        body = msgspec.json.encode({name: _encodable(text) for name, text in said.items()}).decode()
    else:
        body = f"kvdctl: {printable(str(error))}"
    print(body, file=sys.stderr)


@contextmanager
def attached(given: Path | None) -> Iterator[Link]:
    """A tool's connection to the daemon. Raises KvdError."""
    link = Link(socket_path(given), "tool", "kvdctl", None, TIMEOUT_S)
    try:
        yield link
    finally:
        link.close()


# -- results -----------------------------------------------------------------------------------------------


def plain(value: object) -> Any:
    """A message as JSON can hold it: every field under its name, bytes as hex."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def show_json(value: object) -> None:
    """One document on stdout."""
    print(msgspec.json.format(msgspec.json.encode(plain(value)), indent=2).decode())


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Name and value, one pair a line."""
    for name, value in facts:
        print(f"{name:<10} {printable(value)}")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns; numbers to the right. As wide as the terminal, or as the content where there is none."""
    right = [bool(rows) and all(isinstance(row[at], int | float) for row in rows) for at in range(len(columns))]
    cells = [[f"{cell:,}" if isinstance(cell, int) else printable(str(cell)) for cell in row] for row in rows]
    width = shutil.get_terminal_size().columns if on_terminal() else None
    heading, lines = laid_out([printable(name) for name in columns], cells, right, width)  # some are a router's terms
    for line in heading:
        print(typer.style(line, bold=True) if on_terminal() else line)
    for line in lines:
        print(line)


def on_terminal() -> bool:
    """Whether results go to one. Where stdout was closed there is no stdout at all."""
    return sys.stdout is not None and sys.stdout.isatty()


def printable(text: str) -> str:
    """Labels come from peers: no escape sequence of theirs may reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


# -- units -------------------------------------------------------------------------------------------------


def size(count: int) -> str:
    """Bytes for people: "60.0 MiB"."""
    for limit, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count} B"


def several(count: int, noun: str) -> str:
    """ "1 candidate", "2 candidates"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def span(seconds: float) -> str:
    """A duration for people: "3 min"."""
    for limit, unit in ((172800, 86400), (7200, 3600), (120, 60)):
        if seconds >= limit:
            return f"{seconds / unit:.0f} {({86400: 'days', 3600: 'h', 60: 'min'})[unit]}"
    return f"{seconds:.0f} s"


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
