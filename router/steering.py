"""How the proxy asks where a request goes, and tells what became of it. The interface; see leastbusy for a simple one.

The proxy calls `choose` once, and once more for each worker that failed it; then `sent`, `first_byte`, `progressed` in
this order as they happen, and `finished` exactly once for every choice, whatever happens. Notices neither block nor
raise. Times are those of the event loop's clock, in seconds.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import msgspec

from kvd.errors import UNDECODABLE, KvdError

# What became of a request at one worker: answered in full; not taken, because no connection was to be had, or with a
# 503; lost before the first byte of an answer; its answer cut; or nobody wants it any more.
Outcome = Literal["answered", "unreachable", "refused", "no_answer", "cut", "cancelled"]

_LABEL = r"[0-9a-z_-]{1,63}"
_NAMED = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*\.?")  # a name or an IPv4 address
_PORT = re.compile(r"(:[0-9]{0,5})?")
_IPV6 = re.compile(r"[0-9a-f:.]{2,45}(%[0-9A-Za-z._-]{1,15})?")

_decode = msgspec.json.Decoder().decode


class Busy(KvdError):
    """No worker can take the request now. `own_share`: its tenant has more waiting than others (429, else 503)."""

    def __init__(self, message: str, retry_after_s: float, own_share: bool = False) -> None:
        super().__init__(message, f"try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s
        self.own_share = own_share


@dataclass(frozen=True, slots=True)
class Worker:
    """Where an SGLang server listens. `name` is what operators, logs and choices call it."""

    name: str
    host: str
    port: int

    @property
    def authority(self) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode()


def worker_at(url: str) -> Worker:
    """The worker at this URL, which is its name, with the host in lower case. Raises ValueError.

    Strict: names go into logs, pages, labels and headers, and hosts to the resolver.
    """
    wrong = ValueError(f"{url!a:.300}: a worker is http://HOST:PORT")
    if not url.isascii() or not url.isprintable() or any(mark in url for mark in " ?#@"):  # urlsplit drops some
        raise wrong
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        right = _NAMED
        if "[" in parts.netloc:
            IPv6Address(host)  # which lets any name of an interface pass
            right = _IPV6
    except ValueError:
        raise wrong from None
    if parts.scheme != "http" or parts.path.strip("/") or port == 0 or not right.fullmatch(host):
        raise wrong
    shown = f"[{host}]" if ":" in host else host
    if not _PORT.fullmatch(parts.netloc.lower().removeprefix(shown.lower())):  # what stands around brackets is dropped
        raise wrong
    return Worker(f"http://{shown}" + (f":{port}" if port is not None else ""), host, port or 80)


class Incoming(msgspec.Struct):
    """A whole request. `body` is what the worker will get, the tenant's salt included."""

    request_id: str
    method: str
    path: str  # without the query
    fields: list[tuple[bytes, bytes]]  # names in lower case
    body: bytes
    tenant: str  # "" where nobody needs a key
    weight: float  # the tenant's share of the queue
    priority: int  # the tenant's; higher first
    arrived: float
    deadline: float  # by when it must have been sent to a worker
    routed: bool  # which worker answers matters: it generates
    _json: Any = msgspec.UNSET

    @property
    def json(self) -> Any:
        """The body, decoded at the first look; None when it is not JSON, or nothing."""
        if self._json is msgspec.UNSET:
            try:
                self._json = _decode(self.body)
            except UNDECODABLE:
                self._json = None
        return self._json

    @property
    def model(self) -> str | None:
        """What its body calls the model that it is for."""
        body = self.json
        named = body.get("model") if isinstance(body, dict) else None
        return named if isinstance(named, str) else None


class Choice(msgspec.Struct, frozen=True):
    """One worker for one request. `note` is the steering's own business."""

    request: Incoming
    worker: Worker
    note: Any = None


class Steering(Protocol):
    """Chooses workers. Used by one event loop."""

    async def choose(self, request: Incoming, tried: frozenset[str]) -> Choice:
        """The best worker whose name is not in `tried`, as soon as one may take it. Raises Busy.

        May be cancelled while it waits: then no choice was made and `finished` is not called. Where it need not wait
        it should not: up to its first wait it runs in no task (kvd.router.proxy.eager).
        """

    def sent(self, choice: Choice, now: float) -> None:
        """The worker was sent the whole request."""

    def first_byte(self, choice: Choice, status: int, now: float) -> None:
        """The worker began to answer."""

    def progressed(self, choice: Choice, received: bytes, now: float) -> None:
        """More of the answer's body, as it came. Not kept: look at it now or never."""

    def finished(self, choice: Choice, outcome: Outcome, now: float) -> None:
        """The worker has nothing to do for this request any more."""

    def tick(self, now: float) -> None:
        """A moment passed: about four times a second."""

    def describe(self) -> dict[str, float]:
        """Numbers for /kvd/metrics, by name."""
