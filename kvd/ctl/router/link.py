"""The way to a router: its pages over HTTP, the key, and the errors that an operator can act on.

A router may be several processes on one port, each of which knows what it did itself. Which one answers is decided by
the kernel for each connection, so whoever wants them all asks on new connections until each has answered.
"""

import os
from pathlib import Path
from typing import Annotated, Final, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec
import typer

from kvd.errors import UNDECODABLE, KvdError, PeerError, Refused, Unavailable
from kvd.router.pages import replies

DEFAULT_URL: Final = "http://127.0.0.1:30080"
URL_VARIABLE, KEY_VARIABLE = "KVD_ROUTER_URL", "KVD_ROUTER_KEY"
TIMEOUT_S: Final = 3.0  # of one answer; a healthy router needs milliseconds
_REFUSED: Final = 409  # understood, and no: there is no such worker, or no room for one more
_MISDIRECTED: Final = 421
_TRIES: Final = 20  # connections for each process that is looked for
_MOST_PROCESSES: Final = 64  # that a router can be

_ADMIN: Final = f"give an administrator's key: {KEY_VARIABLE}, or --key-file PATH"
_OTHERS: Final = "others of its processes did it: look at `kvdctl worker list` and try again"

R = TypeVar("R", bound=replies.Reply)

RouterOption = Annotated[
    str, typer.Option("--router", metavar="URL", envvar=URL_VARIABLE, help="Where the router listens.")
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        metavar="PATH",
        help=f"An administrator's API key, in a file. By default ${KEY_VARIABLE}; a router without keys needs none.",
        show_default=False,
    ),
]


class RouterLink:
    """One router. Every call opens connections of its own, waits for no byte longer than `timeout_s`, and raises
    KvdError."""

    def __init__(self, url: str, key: str, timeout_s: float = TIMEOUT_S) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            right = False
        if not right or parts.path.strip("/") or parts.query or parts.username is not None:
            raise KvdError(f"{url!r} is no router's address", f"it looks like {DEFAULT_URL}")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._key = key
        self._timeout_s = timeout_s

    def ask(self, path: str, kind: type[R], **query: str) -> R:
        """What one of the router's processes says."""
        status, body = self._exchange("GET", path + _query(query), b"")
        return self._decoded(kind, self._checked(status, body, _ADMIN if status == 403 else ""))

    def ask_all(self, path: str, kind: type[R], **query: str) -> list[R]:
        """What every process says."""
        first = self.ask(path, kind, **query)
        found = {first.pid: first}
        for _ in range(_TRIES * min(first.processes, _MOST_PROCESSES)):
            if len(found) >= first.processes:
                return list(found.values())
            said = self.ask(path, kind, **query)
            found[said.pid] = said
        raise Unavailable(
            f"only {len(found)} of the {first.processes} processes at {self.url} answered", "try again in a moment"
        )

    def change(self, what: str, worker: str) -> None:
        """`what`: add, drain or remove. Told to every process, also where one refuses.

        One in which a worker has drained already knows it no more, and has nothing left to drain or remove.
        """
        _check_text(worker)
        body = msgspec.json.encode(replies.Change(worker))
        answers = [self._told(what, body, one) for one in self.ask_all("/kvd/workers", replies.Workers)]
        done = any(status == 200 for status, _ in answers)
        for status, answer in answers:
            if done and status == _REFUSED and what != "add":
                continue
            try:
                self._decoded(replies.Changed, self._checked(status, answer))
            except Refused as error:
                raise Refused(error.message, _OTHERS if done else error.hint) from error

    def _told(self, what: str, body: bytes, one: replies.Workers) -> tuple[int, bytes]:
        """What this one of the processes answers."""
        path = f"/kvd/workers/{what}{_query({'pid': str(one.pid)})}"
        for _ in range(_TRIES * min(one.processes, _MOST_PROCESSES)):
            status, answer = self._exchange("POST", path, body)
            if status != _MISDIRECTED:
                return status, answer
        raise Unavailable(
            f"process {one.pid} of the router at {self.url} did not answer",
            "others of its processes may have been told: look at `kvdctl worker list` and try again",
        )

    def _exchange(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        from kvd.ctl.router.overhttp import exchange  # what it needs takes longer to load than most commands to run

        return exchange(self.url, method, target, body, self._key, self._timeout_s)

    def _checked(self, status: int, body: bytes, hint: str = "") -> bytes:
        """`hint`: where the router has none."""
        if status == 200:
            return body
        try:
            problem = msgspec.json.decode(body, type=replies.Failed).error
        except UNDECODABLE:
            problem = replies.Problem(f"HTTP {status}")
        if status == 401:
            wrong = "does not know the API key that was given" if self._key else "wants an API key"
            raise Refused(f"the router at {self.url} {wrong}", _ADMIN)
        if status == 404 and not problem.hint:
            raise self._no_router()
        raise Refused(f"the router at {self.url} refused: {problem.message}", problem.hint or hint)

    def _decoded(self, kind: type[R], body: bytes) -> R:
        try:
            said = msgspec.json.decode(body, type=kind)
        except UNDECODABLE as error:
            hint = "install the same version of kvd on both sides"
            raise PeerError(f"the router's answer is not understood: {error}", hint) from error
        if not said.pid:  # every field has a default, so any JSON object would do
            raise self._no_router()
        return said

    def _no_router(self) -> PeerError:
        return PeerError(f"what answers at {self.url} is no kvd-router", "check the URL: is it a worker's?")


def router_at(url: str, key_file: Path | None) -> RouterLink:
    """With the operator's key. Raises KvdError."""
    return RouterLink(url, read_key(key_file))


def read_key(key_file: Path | None) -> str:
    """Empty where none is given. Raises KvdError, which does not show it."""
    if key_file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
    else:
        try:
            key = key_file.read_text().strip()
        except (OSError, ValueError) as error:
            raise KvdError(f"cannot read {key_file}: {error}", "the file holds one API key") from error
    if not (key.isascii() and key.isprintable()):
        raise KvdError(f"{key_file or KEY_VARIABLE} holds more than one API key", "one alone, on one line")
    return key


def _query(query: dict[str, str]) -> str:
    for value in query.values():
        _check_text(value)
    return "?" + urlencode(query, quote_via=quote) if query else ""


def _check_text(given: str) -> None:
    """Bytes of the command line that are no UTF-8 are surrogates by now, and cannot be sent. Raises KvdError."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise KvdError(f"{given!r} is no text", "URLs and ids are UTF-8") from error
