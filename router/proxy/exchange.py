"""One request, from the moment it is whole to the end of its answer: choose, send, relay, and again where that failed.

    choose ── Busy ──────────────────────────────► 429 or 503 with Retry-After
       │  ▲
       ▼  └── lost before the first byte: elsewhere, if asking twice does no harm
    send, relay ── whole ────────────────────────► answered
       │
       └── lost after it: the rest from another worker (kvd.router.continuation), else an error event; a body that is
           no event stream is cut, which its length or its last chunk tells the client

Events are passed on as they came, each as soon as it is whole. What a client does not read is not taken from a worker.
Always true: each choice is finished once; a client that left has no request at a worker.
"""

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from kvd.router.continuation import CannotContinue, Splice, Transcript, needs_count, rest_of
from kvd.router.proxy.answers import Answer
from kvd.router.proxy.asking import ask
from kvd.router.proxy.endpoints import Endpoint, error_body, error_event
from kvd.router.proxy.events import WholeEvents
from kvd.router.proxy.headers import Fields, request_head
from kvd.router.proxy.strict import Head
from kvd.router.proxy.upstream import Connection, Lost
from kvd.router.steering import Busy, Choice, Incoming, Outcome

if TYPE_CHECKING:
    from kvd.router.proxy.client import Client
    from kvd.router.proxy.house import House

log = logging.getLogger("kvd.router")
_ATTEMPTS = 3  # workers that are asked for one answer
_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS"})
_JSON = (b"content-type", b"application/json")


class Exchange:
    """Implements kvd.router.proxy.upstream.Receiver."""

    def __init__(self, client: "Client", house: "House", head: Head, endpoint: Endpoint, request: Incoming) -> None:
        self._client = client
        self._house = house
        self._head = head
        self._endpoint = endpoint
        self._request = request
        self._loop = house.loop
        self._answer = Answer(head, request.request_id.encode(), head.keep and not house.draining)
        self._choice: Choice | None = None
        self._connection: Connection | None = None
        self._over: asyncio.Future[tuple[Outcome, str]] | None = None
        self._tried: set[str] = set()
        self._events: WholeEvents | None = None
        self._transcript: Transcript | None = None
        self._splice: Splice | None = None
        self._done = False  # the client has all that it will get
        self._heard = 0.0  # when the worker last said something, or was sent the request
        self._task = house.loop.create_task(self._run(), name="exchange")

    # What the client does

    def leave(self) -> None:
        """The client is gone: so is the request. Idempotent."""
        if self._connection is not None:
            self._connection.abandon()
        self._finish("cancelled")
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
            self.lost(f"the worker said nothing for {silence_s:.0f} s")

    # The course of it

    async def _run(self) -> None:
        try:
            await self._serve()
        except Exception:
            log.exception("request %s failed in the router", self._request.request_id)
            self._house.counts["failures"] += 1
            if self._connection is not None:
                self._connection.abandon()
            self._end_badly(500, "the router failed at this request; its log says why")
        finally:
            self._finish("cancelled")

    async def _serve(self) -> None:
        request = self._request
        while True:
            try:
                choice = await self._house.steering.choose(request, frozenset(self._tried))
            except Busy as busy:
                self._end_badly(429 if busy.own_share else 503, str(busy), busy.retry_after_s)
                return
            outcome, why = await self._attempt(choice, request)
            if outcome == "answered":
                return
            self._tried.add(choice.worker.name)
            self._house.counts[outcome] += 1
            log.warning("request %s: %s at %s: %s", request.request_id, outcome, choice.worker.name, why)
            if self._answer.started:
                try:
                    request = await self._continue()
                except CannotContinue as reason:
                    log.warning("request %s: not continued: %s", request.request_id, reason)
                    self._end_badly(502, f"the worker left in the middle of its answer, which ends here: {reason}")
                    return
                if not request.body:  # nothing was missing but the end
                    return
            elif len(self._tried) >= _ATTEMPTS or not self._may_repeat(outcome):
                self._end_badly(502, f"{choice.worker.name}: {why}")
                return

    def _may_repeat(self, outcome: Outcome) -> bool:
        """Asking another worker does no harm: it was not asked yet, or the answer changes nothing at the worker."""
        return outcome == "unreachable" or self._request.routed or self._head.method in _REPEATABLE

    async def _attempt(self, choice: Choice, request: Incoming) -> tuple[Outcome, str]:
        self._choice = choice
        pool = self._house.pools.get(choice.worker.name)
        if pool is None:
            self._finish("unreachable")
            return "unreachable", "it has just left"
        # One that lay idle may be closing: what changes a worker is not sent twice, so it is not sent there.
        once = not self._may_repeat("no_answer")
        try:
            connection = (None if once else pool.take_nowait()) or await pool.connect(once)
        except Lost as lost:
            self._finish("unreachable")
            return "unreachable", str(lost)
        house, now = self._house, self._loop.time()
        self._connection, self._heard = connection, now
        self._over = self._loop.create_future()
        head = request_head(
            self._head, choice.worker.authority, len(request.body), request.request_id.encode(),
            house.tenants.needed, house.worker_key,
        )  # fmt: skip
        connection.send(request.method, head, request.body, self)
        if self._client.paused:
            connection.pause()
        house.steering.sent(choice, now)
        return await self._over

    def _end(self, outcome: Outcome, why: str = "") -> None:
        self._connection = None
        self._finish(outcome)
        if self._over is not None and not self._over.done():
            self._over.set_result((outcome, why))

    def _finish(self, outcome: Outcome) -> None:
        if (choice := self._choice) is not None:
            self._choice = None
            self._house.steering.finished(choice, outcome, self._loop.time())

    # What the worker says: kvd.router.proxy.upstream.Receiver

    def answer(
        self, status: int, fields: list[tuple[bytes, bytes]], length: int | None, body: bytes, whole: bool
    ) -> None:
        assert self._choice is not None
        self._heard = self._loop.time()
        if self._splice is not None:
            if status != 200:
                self._let_go("cut", f"status {status} for the rest")
                return
        elif status == 503 and self._request.routed and len(self._tried) + 1 < min(_ATTEMPTS, len(self._house.pools)):
            self._let_go("refused", "status 503")
            return
        else:
            self._begin(status, fields, length, len(body) if whole and self._head.method != "HEAD" else None)
        self._house.steering.first_byte(self._choice, status, self._heard)
        self._relay(body, whole)

    def more(self, body: bytes, whole: bool) -> None:
        self._heard = self._loop.time()
        self._relay(body, whole)

    def lost(self, why: str) -> None:
        self._end("cut" if self._answer.started else "no_answer", why)

    def _let_go(self, outcome: Outcome, why: str) -> None:
        if self._connection is not None:
            self._connection.abandon()
        self._end(outcome, why)

    def _begin(self, status: int, fields: Fields, length: int | None, known: int | None) -> None:
        """`known`: how long the body is, where it is whole already: then it needs no chunks, unless it is a stream."""
        kind = {name: value for name, value in fields if name in (b"content-type", b"content-encoding")}
        stream = kind.get(b"content-type", b"").startswith(b"text/event-stream") and b"content-encoding" not in kind
        streamed = stream and length is None
        self._answer.begin(status, fields, length if streamed or known is None else known)
        if streamed:
            self._events = WholeEvents()
            if self._endpoint.stream and status == 200:
                self._transcript = Transcript(self._endpoint.stream)

    def _relay(self, body: bytes, whole: bool) -> None:
        assert self._choice is not None
        self._house.steering.progressed(self._choice, body, self._heard)
        if self._events is not None:
            body = self._events.rest(body) if whole else self._events.take(body)
            if self._splice is not None:
                body = self._splice.translate(body)
            if self._transcript is not None:
                self._transcript.feed(body)
        self._answer.body(body)
        if whole:
            self._end("answered")
            self._complete()
        elif out := self._answer.take():
            self._client.write(out)

    def _complete(self) -> None:
        """The answer is whole."""
        self._done = True
        self._answer.end()
        self._client.write(self._answer.take())
        self._client.done(self._answer.keep)

    # Where it went wrong

    async def _continue(self) -> Incoming:
        """The request for the rest of a stream that was cut; with no body where nothing is missing but its end."""
        so_far, events = self._transcript, self._events
        if events is not None:
            events.drop()
        if so_far is None or events is None or events.inside:
            raise CannotContinue("this kind of answer cannot be continued")
        asked = self._request.json
        if (missing := so_far.ending(asked)) is not None:
            self._answer.body(missing)
            self._complete()
            return replace(self._request, body=b"")
        if len(self._tried) >= _ATTEMPTS:
            raise CannotContinue("too many workers left")
        counted = await self._count(so_far.text) if needs_count(asked, so_far) else None
        rest = rest_of(asked, so_far, counted)
        self._splice = Splice(so_far, counted)
        self._house.counts["continued"] += 1
        return replace(self._request, body=msgspec.json.encode(rest), _json=rest)

    async def _count(self, text: str) -> int | None:
        """Tokens of a text, as a worker counts them; None where none says."""
        body = msgspec.json.encode({"prompt": text, "add_special_tokens": False})
        request = replace(self._request, method="POST", path="/tokenize", body=body, routed=False, _json=msgspec.UNSET)
        said = await ask(self._house, request, frozenset(self._tried))
        count = said.get("count") if isinstance(said, dict) else None
        return count if isinstance(count, int) else None

    def _end_badly(self, status: int, why: str, retry_after_s: float | None = None) -> None:
        """The client is told, in the way that is left: a status, an event, or a connection that is cut."""
        if self._done:
            return
        answer, path = self._answer, self._request.path
        if not answer.started:
            self._done = True
            fields = [_JSON]
            if retry_after_s is not None:
                fields.append((b"retry-after", b"%d" % max(1, round(retry_after_s))))
            body = error_body(self._endpoint.dialect, status, why)
            self._client.write(answer.whole(status, body, fields))
            self._client.done(answer.keep)
        elif self._events is not None and not self._events.inside:
            answer.body(error_event(path, status, why))
            self._complete()
        else:
            self._client.cut()
