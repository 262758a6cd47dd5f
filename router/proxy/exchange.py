"""One request, from the moment it is whole to the end of its answer: choose, send, relay, and again where that failed.

    choose ── Busy ──────────────────────────────► 429 or 503 with Retry-After
       │  ▲
       ▼  └── lost before the first byte: elsewhere, if asking twice does no harm
    send, relay ── whole ────────────────────────► answered
       │
       └── lost after it: the rest from another worker (kvd.router.proxy.streamed), else an error event; a body that is
           no event stream is cut, which its length or its last chunk tells the client

What waits for something runs in a task; all else in the calls of two connections, the client's and the worker's.
What a client does not read is not taken from a worker.
Always true: each choice is finished once; a client that left has no request at a worker.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from kvd.router.continuation import CannotContinue
from kvd.router.proxy import eager
from kvd.router.proxy.asking import count_tokens
from kvd.router.proxy.endpoints import Endpoint
from kvd.router.proxy.headers import request_head
from kvd.router.proxy.relay import Relay
from kvd.router.proxy.strict import Head
from kvd.router.proxy.upstream import Connection, Lost
from kvd.router.steering import Busy, Choice, Incoming, Outcome

if TYPE_CHECKING:
    from kvd.router.proxy.client import Client
    from kvd.router.proxy.house import House

log = logging.getLogger("kvd.router")
_ATTEMPTS = 3  # workers that are asked for one answer
_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS"})
_NOBODY: frozenset[str] = frozenset()


class Exchange:
    """Implements kvd.router.proxy.upstream.Receiver."""

    __slots__ = (
        "_choice", "_client", "_connection", "_head", "_heard", "_house", "_id", "_old", "_relay", "_request", "_sent",
        "_task", "_tried",
    )  # fmt: skip

    def __init__(self, client: "Client", house: "House", head: Head, endpoint: Endpoint, request: Incoming) -> None:
        self._client = client
        self._house = house
        self._head = head
        self._request = request
        self._id = request.request_id.encode()
        self._relay = Relay(client, head, endpoint, self._id, head.keep and not house.draining)
        self._choice: Choice | None = None
        self._connection: Connection | None = None
        self._tried = _NOBODY
        self._sent = request  # what the worker was asked: this, or the rest of it
        self._old = False  # over a connection that had lain idle, and nothing came back yet
        self._heard = 0.0  # when the worker last said something, or was sent the request
        self._task: asyncio.Task[None] | None = None

    # What the client does

    def begin(self) -> None:
        """Ask a worker. Everything may be over when it returns."""
        self._run(self._attempt(self._request))

    def leave(self) -> None:
        """The client is gone: so is the request. Idempotent."""
        if self._connection is not None:
            self._connection.abandon()
        self._finish("cancelled")
        if self._task is not None:
            self._task.cancel()

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def check(self, now: float, silence_s: float) -> None:
        """A worker that has been silent for too long counts as lost. One that we do not read is not silent."""
        if self._client.paused:
            self._heard = now
        elif self._connection is not None and now - self._heard > silence_s:
            self._connection.abandon()
            self._old = False
            self.lost(f"the worker said nothing for {silence_s:.0f} s")

    # Asking

    def _run(self, course: Coroutine[Any, Any, None]) -> None:
        if (task := eager.start(course, self._house.loop, "exchange")) is not None:
            self._task = task  # where there was one, it does nothing more but end

    async def _attempt(self, request: Incoming) -> None:
        """Find a worker, and send it this. What becomes of it the worker's connection tells."""
        try:
            self._sent = request
            choice = self._choice = await self._house.steering.choose(request, self._tried)
            # A connection that lay idle may be closing: what changes a worker is not sent twice, so not over one.
            await self._send(choice, new=not self._may_repeat)
            self._house.steering.sent(choice, self._heard)
        except Busy as busy:
            self._relay.fail(429 if busy.own_share else 503, str(busy), busy.retry_after_s)
        except Lost as lost:
            self._failed("unreachable", str(lost))
        except Exception:
            self._break_down()

    async def _again(self, choice: Choice) -> None:
        """The connection was closed for having lain idle as the request came: that says nothing of its worker."""
        try:
            await self._send(choice, new=True)
        except Lost as lost:
            self._failed("unreachable", str(lost))
        except Exception:
            self._break_down()

    async def _send(self, choice: Choice, new: bool) -> None:
        """To its worker, over any connection or a `new` one. Raises Lost."""
        house, request, name = self._house, self._sent, choice.worker.name
        if (pool := house.pools.get(name)) is None:
            raise Lost("it has just left")
        connection = None if new else pool.take_nowait()
        self._old = connection is not None
        if connection is None:
            connection = await pool.connect(once=not self._may_repeat)
            if house.pools.get(name) is not pool:
                connection.abandon()
                raise Lost("it has just left")
        self._heard = house.loop.time()
        self._connection = connection
        keys = house.tenants.needed, house.worker_key
        head = request_head(self._head, pool.authority, len(request.body), self._id, *keys)
        connection.send(request.method, head, request.body, self)
        if self._client.paused:
            connection.pause()

    @property
    def _may_repeat(self) -> bool:
        """Asking a second worker does no harm: the answer changes nothing at the first."""
        return self._request.routed or self._head.method in _REPEATABLE

    def _finish(self, outcome: Outcome) -> None:
        if (choice := self._choice) is not None:
            self._choice = self._connection = None
            self._house.steering.finished(choice, outcome, self._house.loop.time())

    # What the worker says: kvd.router.proxy.upstream.Receiver

    def answer(
        self, status: int, fields: list[tuple[bytes, bytes]], length: int | None, body: bytes, whole: bool
    ) -> None:
        try:
            self._begun(status, fields, length, body, whole)
        except Exception:  # out of here it would end the whole router
            self._break_down()

    def _begun(
        self, status: int, fields: list[tuple[bytes, bytes]], length: int | None, body: bytes, whole: bool
    ) -> None:
        assert self._choice is not None
        self._heard, self._old = self._house.loop.time(), False
        if self._relay.started:  # the rest of a stream
            if status != 200:
                self._let_go("cut", f"status {status} for the rest")
                return
            begun = b""
        elif status == 503 and self._request.routed and len(self._tried) + 1 < min(_ATTEMPTS, len(self._house.pools)):
            self._let_go("refused", "status 503")
            return
        else:
            known = len(body) if whole and self._head.method != "HEAD" else None
            begun = self._relay.begin(status, fields, length, known)
        self._house.steering.first_byte(self._choice, status, self._heard)
        self._hand_on(begun, body, whole)

    def more(self, body: bytes, whole: bool) -> None:
        self._heard = self._house.loop.time()
        try:
            self._hand_on(b"", body, whole)
        except Exception:
            self._break_down()

    def lost(self, why: str) -> None:
        if self._old and self._choice is not None:
            self._connection, self._old = None, False
            self._run(self._again(self._choice))
        else:
            self._failed("cut" if self._relay.started else "no_answer", why)

    def _let_go(self, outcome: Outcome, why: str) -> None:
        if self._connection is not None:
            self._connection.abandon()
        self._failed(outcome, why)

    def _hand_on(self, begun: bytes, body: bytes, whole: bool) -> None:
        assert self._choice is not None
        if body:
            self._house.steering.progressed(self._choice, body, self._heard)
        try:
            self._relay.more(begun, body, whole)
        except CannotContinue as reason:
            if self._connection is not None:
                self._connection.abandon()
            self._finish("cancelled")
            self._ends_here(reason)
            return
        if whole:  # last: what is learnt from it no client need wait for
            self._finish("answered")

    # Where it went wrong

    def _failed(self, outcome: Outcome, why: str) -> None:
        """The worker did not answer, or not to the end."""
        assert self._choice is not None
        name = self._choice.worker.name
        self._finish(outcome)
        self._tried |= {name}
        self._house.counts[outcome] += 1
        log.warning("request %s: %s at %s: %s", self._request.request_id, outcome, name, why)
        if self._relay.started:
            self._run(self._continue())
        elif len(self._tried) < _ATTEMPTS and (outcome == "unreachable" or self._may_repeat):
            self._run(self._attempt(self._request))
        else:
            self._relay.fail(502, f"{name}: {why}")

    async def _continue(self) -> None:
        """The rest of a stream that was cut, from another worker."""
        try:
            stream, asked = self._relay.stream, self._request.json
            if stream is None:
                raise CannotContinue("this kind of answer cannot be continued")
            if (ending := stream.ending(asked)) is not None:
                self._relay.complete(ending)
                return
            if len(self._tried) >= _ATTEMPTS:
                raise CannotContinue("too many workers left")
            uncounted = stream.must_count(asked)
            counted = None
            if uncounted is not None:
                counted = await count_tokens(self._house, self._request, uncounted, self._tried)
            rest = stream.go_on(asked, counted)
            request = msgspec.structs.replace(self._request, body=msgspec.json.encode(rest), _json=rest)
        except CannotContinue as reason:
            self._ends_here(reason)
        except Exception:
            self._break_down()
        else:
            self._house.counts["continued"] += 1
            await self._attempt(request)

    def _ends_here(self, reason: CannotContinue) -> None:
        log.warning("request %s: not continued: %s", self._request.request_id, reason)
        self._relay.fail(502, f"the worker left in the middle of its answer, which ends here: {reason}")

    def _break_down(self) -> None:
        """Something that should not happen: to this request alone."""
        log.exception("request %s failed in the router", self._request.request_id)
        self._house.counts["failures"] += 1
        if self._connection is not None:
            self._connection.abandon()
        self._finish("cancelled")
        self._relay.fail(500, "the router failed at this request; its log says why")
