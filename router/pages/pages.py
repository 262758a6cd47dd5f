"""The table of the router's own pages: what each takes, who may see it, what it answers. Never blocks.

    GET  /kvd/health            ok; 503 on what is still open while it drains       everybody
    GET  /kvd/metrics           Prometheus text                                     everybody
    GET  /kvd/decisions         ?last=N (100 at most), or ?request=ID               administrators
    GET  /kvd/workers           who is there, what each has to do and did lately    administrators
    GET  /kvd/ledger            tokens available, achieved, lost                    administrators
    POST /kvd/workers/add       {"worker": "http://HOST:PORT"}                      administrators
    POST /kvd/workers/drain     the same: gets nothing new, and leaves              administrators
    POST /kvd/workers/remove    the same: leaves at once                            administrators

Who administrators are: kvd.router.pages.access. Each process of a router answers for itself: what it answers says
which it was and how many there are. A change is one process's too; one that is meant for another (`?pid=`) is refused
with 421, and the client tries again until it meets it, as kvdctl does.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

import msgspec

from kvd import __version__
from kvd.errors import UNDECODABLE, KvdError
from kvd.router.pages import access, metrics, replies, telling
from kvd.router.pages.told import Told
from kvd.router.proxy.strict import Head, Malformed
from kvd.router.tenants import Tenant

if TYPE_CHECKING:
    from kvd.router.proxy.house import House

log = logging.getLogger("kvd.router")
FOLDER: Final = b"/kvd/"
_LAST: Final = 20
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_TEXT: Final = b"text/plain; charset=utf-8"
_JSON: Final = b"application/json"
_decode_change = msgspec.json.Decoder(replies.Change).decode


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    kind: bytes = _JSON


@dataclass(frozen=True, slots=True)
class Page:
    """`takes`: the names of what may follow the `?`. `body`: a change that it makes."""

    answer: Callable[["Pages", dict[str, str], bytes], Reply]
    method: str = "GET"
    everybodys: bool = False
    takes: frozenset[str] = frozenset()


class Pages:
    """The pages of one process, shown to the house's clients."""

    def __init__(self, told: Told, house: "House") -> None:
        self._told = told
        self._house = house
        self._pid = os.getpid()

    def admit(self, head: Head, tenant: Tenant | None, peer: str) -> None:
        """Whether this client may ask this, before its body is taken. Raises Malformed."""
        page = PAGES.get(head.path)
        if page is None or not page.everybodys:
            changes = page is not None and page.method == "POST"
            access.admit(head, tenant, self._house.tenants.needed, peer, changes)

    def answer(self, head: Head, body: bytes) -> Reply:
        page = PAGES.get(head.path)
        if page is None:
            return _failed(404, "no such page", f"there are {', '.join(PAGES)}")
        if head.method != page.method and (head.method, page.method) != ("HEAD", "GET"):
            return _failed(405, f"{page.method} only")
        try:
            return page.answer(self, {} if page.everybodys else _asked(head, page.takes), body)
        except Malformed as wrong:
            return _failed(wrong.status, wrong.why)
        except KvdError as error:
            return _failed(409, error.message, error.hint)
        except Exception:
            log.exception("%s failed", head.path)
            self._house.counts["failures"] += 1
            return _failed(500, "the router failed at this page; its log says why")

    # GET

    def health(self, asked: dict[str, str], body: bytes) -> Reply:
        return Reply(503, b"draining\n", _TEXT) if self._house.draining else Reply(200, b"ok\n", _TEXT)

    def metrics(self, asked: dict[str, str], body: bytes) -> Reply:
        numbers = self._house.numbers() | {"decisions_total": self._told.decisions.total}
        numbers |= metrics.of_workers(self._workers())
        numbers |= metrics.of_ledger(telling.ledger(self._told.ledger))
        return Reply(200, metrics.exposition(numbers).encode(), metrics.CONTENT_TYPE)

    def decisions(self, asked: dict[str, str], body: bytes) -> Reply:
        decisions, now = self._told.decisions, self._house.loop.time()
        if (request := asked.get("request")) is not None:
            shown = telling.of_request(decisions, request, now)
        else:
            last = asked.get("last", str(_LAST))
            if not _NUMBER.fullmatch(last):
                raise Malformed(400, f"last={last}: a number, {telling.MOST_LISTED} at most")
            shown = telling.listed(decisions, int(last), now)
        return self._said(
            replies.Decisions(
                decisions=shown, total=decisions.total, kept=len(decisions), **self._process()
            )
        )  # fmt: skip

    def workers(self, asked: dict[str, str], body: bytes) -> Reply:
        waiting = int(self._house.steering.describe().get("waiting", 0))
        return self._said(
            replies.Workers(
                policy=self._told.policy, workers=self._workers(), waiting=waiting, version=__version__,
                **self._process(),
            )
        )  # fmt: skip

    def ledger(self, asked: dict[str, str], body: bytes) -> Reply:
        return self._said(msgspec.structs.replace(telling.ledger(self._told.ledger), **self._process()))

    # POST

    def add(self, asked: dict[str, str], body: bytes) -> Reply:
        return self._change(self._told.fleet.add, "added", asked, body)

    def drain(self, asked: dict[str, str], body: bytes) -> Reply:
        return self._change(self._told.fleet.drain, "draining", asked, body)

    def remove(self, asked: dict[str, str], body: bytes) -> Reply:
        return self._change(self._told.fleet.remove, "removed", asked, body)

    def _change(self, change: Callable[[str], object], done: str, asked: dict[str, str], body: bytes) -> Reply:
        if asked.get("pid", str(self._pid)) != str(self._pid):
            return _failed(421, f"this is process {self._pid}", "ask again, on a new connection")
        try:
            worker = _decode_change(body).worker.rstrip("/")  # as a worker that is added is named
        except UNDECODABLE as error:
            raise Malformed(400, f'the body must be {{"worker": "http://HOST:PORT"}}: {error}') from error
        change(worker)
        log.info("%s: %s, as an operator asked", worker, done)
        return self._said(replies.Changed(worker=worker, done=done, **self._process()))

    # Inside

    def _workers(self) -> list[replies.Worker]:
        told, now = self._told, self._house.loop.time()
        connections = {name: len(pool) for name, pool in self._house.pools.items()}
        return telling.workers(told.fleet.members(), told.load, connections, telling.recent(told.decisions, now))

    def _process(self) -> dict[str, int]:
        return {"pid": self._pid, "processes": self._told.processes}

    @staticmethod
    def _said(reply: replies.Reply) -> Reply:
        return Reply(200, msgspec.json.encode(reply) + b"\n")


def _asked(head: Head, takes: frozenset[str]) -> dict[str, str]:
    """What follows the `?`. Raises Malformed for what the page does not know, or is told twice."""
    pairs = parse_qsl(head.target.partition(b"?")[2].decode("latin-1"), keep_blank_values=True)
    for name, _ in pairs:
        if name not in takes:
            raise Malformed(400, f"{head.path} knows no {name!r}, only {', '.join(sorted(takes)) or 'itself'}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise Malformed(400, "the same twice")
    return dict(pairs)


def _failed(status: int, error: str, hint: str = "") -> Reply:
    return Reply(status, msgspec.json.encode(replies.Failed(replies.Problem(error, hint))) + b"\n")


_PID: Final = frozenset({"pid"})
PAGES: Final = {
    "/kvd/health": Page(Pages.health, everybodys=True),
    "/kvd/metrics": Page(Pages.metrics, everybodys=True),
    "/kvd/decisions": Page(Pages.decisions, takes=frozenset({"last", "request"})),
    "/kvd/workers": Page(Pages.workers),
    "/kvd/ledger": Page(Pages.ledger),
    "/kvd/workers/add": Page(Pages.add, "POST", takes=_PID),
    "/kvd/workers/drain": Page(Pages.drain, "POST", takes=_PID),
    "/kvd/workers/remove": Page(Pages.remove, "POST", takes=_PID),
}
