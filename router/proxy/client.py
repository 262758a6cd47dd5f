"""One client's connection: bytes in, whole requests to the house, answers out in the order of the requests.

A request is taken apart by kvd.router.proxy.inbox; the first thing that is wrong with it ends the connection, because
where the next request begins is then anybody's guess. Requests that come before the last one is answered wait.
Always true: a client that leaves, however, leaves nothing running; what it may make us hold is bounded; each state it
can keep us in has a deadline.
"""

import asyncio
import logging
import select
import socket
from typing import TYPE_CHECKING, cast

from kvd.router.proxy.answers import Answer, plain_error
from kvd.router.proxy.endpoints import Endpoint, error_body
from kvd.router.proxy.everywhere import Everywhere
from kvd.router.proxy.exchange import Exchange
from kvd.router.proxy.headers import CONTINUE
from kvd.router.proxy.inbox import Inbox
from kvd.router.proxy.strict import Head, Malformed
from kvd.router.steering import Incoming
from kvd.router.tenants import Tenant

if TYPE_CHECKING:
    from kvd.router.proxy.house import House

log = logging.getLogger("kvd.router")
_WRITE_HIGH_BYTES = 256 << 10
_AHEAD_BYTES = 64 << 10  # of later requests, while one is answered
_LINGER_S = 1.0
_LAST_S = 1.0  # those who ask often have asked by then
_FOREVER = float("inf")


class Client(asyncio.Protocol):
    """One connection."""

    __slots__ = (
        "_admitted", "_deadline", "_due", "_ended", "_endpoint", "_exchange", "_head", "_held", "_house", "_inbox",
        "_limits", "_peer", "_reserved", "_tenant", "_transport", "paused",
    )  # fmt: skip

    def __init__(self, house: "House") -> None:
        self._house = house
        self._limits = house.limits
        self._transport: asyncio.Transport | None = None
        self._peer = ""  # its address
        self._inbox = Inbox(self._limits.head_bytes, self._limits.body_bytes)
        self._head: Head | None = None  # of the request whose body is on its way
        self._admitted: Head | None = None  # the last that was, where that stays so
        self._endpoint = Endpoint()
        self._tenant: Tenant | None = None
        self._reserved = 0  # bytes of body counted in the house
        self._exchange: Exchange | Everywhere | None = None
        self._ended = False  # nothing more is read
        self._due = False  # the next request is looked at in a moment
        self._held = False  # nothing is read for now
        self._deadline = _FOREVER
        self.paused = False  # it does not take what we send

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self._peer = str((transport.get_extra_info("peername") or ("",))[0])
        self._deadline = self._house.loop.time() + self._limits.head_s
        if not self._house.enter(self):
            self._refuse(503, "too many connections")

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if not self._busy and self._head is None and not self._inbox:
            self._deadline = self._house.loop.time() + self._limits.head_s
        self._inbox.add(data)
        self._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self._transport = None
        self._leave()
        self._house.exit(self)

    def pause_writing(self) -> None:
        self.paused = True
        self._deadline = self._house.loop.time() + self._limits.send_s
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self.paused = False
        if self._exchange is not None:
            self._deadline = _FOREVER
            self._exchange.resume()
        elif not self._ended:
            self._wait_for_next()

    # In

    @property
    def _busy(self) -> bool:
        """What came since has to wait: for an answer, or for a client that does not take the last one."""
        return self._exchange is not None or self.paused or self._due

    def _go_on(self) -> None:
        """Look at what is there, and read on only while it is not much that has to wait."""
        try:
            if not self._busy:
                self._advance()
        except Exception:  # out of here it would end the whole router
            log.exception("a connection from %s failed in the router, and is cut", self._peer)
            self._house.counts["failures"] += 1
            self.cut()
            return
        hold = self._busy and len(self._inbox) > _AHEAD_BYTES
        if hold is not self._held and self._transport is not None and not self._transport.is_closing():
            self._held = hold
            self._transport.pause_reading() if hold else self._transport.resume_reading()

    def _advance(self) -> None:
        """Take apart what was received, until a request is whole or more has to come."""
        try:
            head = self._head
            if head is None:
                head = self._head = self._inbox.head()
                if head is None:
                    return
                self._admit(head)
            body = self._inbox.body(head)
            self._reserve(self._inbox.body_bytes if body is None else len(body))
        except Malformed as wrong:
            self._house.counts["refused"] += 1
            self._refuse(wrong.status, wrong.why)
            return
        if body is None:
            return
        self._head = None
        self._deadline = _FOREVER
        assert self._tenant is not None
        own = self._house.own_page(head, body)
        if own is not None:
            self.write(own)
            self.done(head.keep)
            return
        try:
            request = self._house.request(head, self._endpoint, self._tenant, body)
            exchange = self._started(head, request)
        except Malformed as wrong:
            answer = Answer(head, self._house.request_id(head).encode(), head.keep)
            self.write(answer.whole(wrong.status, error_body(self._endpoint.dialect, wrong.status, wrong.why)))
            self.done(answer.keep)
            return
        self._exchange = exchange
        exchange.begin()

    def _started(self, head: Head, request: Incoming) -> Exchange | Everywhere:
        if self._endpoint.routed:
            return Exchange(self, self._house, head, self._endpoint, request)
        pools = self._house.pools
        named = head.single.get(b"x-kvd-worker", b"").decode("latin-1")
        if named and named not in pools:  # it has left while the body came
            raise Malformed(404, f"x-kvd-worker: known are {', '.join(pools)}")
        if named:
            return Everywhere(self, self._house, head, request, [pools[named].worker], single=True)
        if self._endpoint.everywhere and len(pools) > 1:
            workers = [pool.worker for pool in pools.values()]
            return Everywhere(self, self._house, head, request, workers, single=False)
        return Exchange(self, self._house, head, self._endpoint, request)

    def _admit(self, head: Head) -> None:
        """Whether this client may ask this at all, before its body is taken."""
        if head is not self._admitted:  # who asks for the same once more has the same key
            self._endpoint, self._tenant = self._house.admit(head, self._peer)
            self._admitted = head if b"x-kvd-worker" not in head.single else None
        if head.length > self._limits.body_bytes:
            raise Malformed(413, f"the body is larger than {self._limits.body_bytes} bytes")
        self._deadline = self._house.loop.time() + self._limits.body_s
        if head.expects and (head.length or head.chunked) and not self._inbox.body_begun:
            self.write(CONTINUE)

    def _reserve(self, size: int) -> None:
        """Count what came of the body, not what was announced: `size` bytes by now."""
        if not self._house.reserve(size - self._reserved):
            raise Malformed(503, "too many large requests at once")
        self._reserved = size

    def _release(self) -> None:
        self._house.release(self._reserved)
        self._reserved = 0

    # Out: what an exchange calls

    def write(self, data: bytes) -> None:
        if self._transport is not None and data:
            self._transport.write(data)

    def done(self, keep: bool) -> None:
        """The answer is whole: on with the next request, or goodbye."""
        self._exchange = None
        self._release()
        if self._transport is None:
            return
        if not keep:
            self.close()
        elif not self.paused:
            self._wait_for_next()

    def _wait_for_next(self) -> None:
        """For a request; one that is there already is looked at in a moment.

        Not at once: a thousand requests in one packet must not be a thousand calls deep.
        """
        ahead, limits = len(self._inbox), self._limits
        idle_s = _LAST_S if self._house.draining else limits.idle_s
        within_s = limits.body_s if self._head is not None else limits.head_s if ahead else idle_s
        self._deadline = self._house.loop.time() + within_s
        if ahead and not self._due:
            self._due = True
            self._house.loop.call_soon(self._next)

    def _next(self) -> None:
        self._due = False
        if not self._ended:
            self._go_on()

    def cut(self) -> None:
        """The answer ends here and is not whole: the client must see that."""
        self._ended = True
        self._release()
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, status: int, why: str) -> None:
        answer = Answer(None, self._house.request_id(None).encode(), keep=False)
        self.write(answer.whole(status, plain_error(status, why)))
        self._ended = True
        self._release()
        self._inbox.clear()
        # Closing with bytes unread would reset the connection, and the client might never see why: it may send on for
        # a moment, to nobody.
        self._deadline = self._house.loop.time() + _LINGER_S
        if self._transport is not None:
            self._transport.write_eof()

    # What the house calls

    @property
    def idle(self) -> bool:
        """It asked for nothing that is not answered."""
        return self._exchange is None and self._head is None and not self._inbox

    def last_call(self) -> None:
        """The router stops. To close at once would be to lose a request that is on its way."""
        if self.idle:
            self._deadline = self._house.loop.time() + _LAST_S

    def check(self, now: float) -> None:
        """Called about four times a second."""
        if self._held and not self._ended and self._left():
            self.cut()
            self._leave()
            return
        if self._exchange is not None:
            self._exchange.check(now, self._limits.silence_s)
        if now < self._deadline:
            return
        self._deadline = _FOREVER
        if self._ended or self.paused:  # and does not take what we send, not even the last of it
            self.cut()
        elif self.idle:
            self.close()
        else:
            self._house.counts["late"] += 1
            self._refuse(408, "the request did not arrive in time")

    def close(self) -> None:
        """Close the connection once it has what was written, which it has some time for. Idempotent."""
        self._ended = True
        if self._transport is not None:
            self._deadline = self._house.loop.time() + self._limits.send_s
            self._transport.close()

    def _left(self) -> bool:
        """Whether it has closed its end: nobody reads, so nobody sees that otherwise."""
        assert self._transport is not None
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def _leave(self) -> None:
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.leave()
        self._release()
