"""One client's connection: bytes in, whole requests to the house, answers out in the order of the requests.

A request is taken apart by kvd.router.proxy.inbox; the first thing that is wrong with it ends the connection, because
where the next request begins is then anybody's guess. Requests that come before the last one is answered wait.
Always true: a client that leaves, however, leaves nothing running; what it may make us hold is bounded; each state it
can keep us in has a deadline.
"""

import asyncio
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

_WRITE_HIGH_BYTES = 256 << 10
_AHEAD_BYTES = 64 << 10  # of later requests, while one is answered
_LINGER_S = 1.0
_FOREVER = float("inf")


class Client(asyncio.Protocol):
    """One connection."""

    __slots__ = (
        "_admitted", "_deadline", "_ended", "_endpoint", "_exchange", "_head", "_house", "_inbox", "_limits",
        "_peer", "_reserved", "_tenant", "_transport", "paused",
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
        inbox = self._inbox
        if self._exchange is None:
            if self._head is None and not inbox:
                self._deadline = self._house.loop.time() + self._limits.head_s
            inbox.add(data)
            self._advance()
            return
        inbox.add(data)
        if len(inbox) > _AHEAD_BYTES:
            assert self._transport is not None
            self._transport.pause_reading()

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
        self._deadline = _FOREVER if self._exchange is not None else self._house.loop.time() + self._limits.idle_s
        if self._exchange is not None:
            self._exchange.resume()

    # In

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
        except Malformed as wrong:
            answer = Answer(head, self._house.request_id(head).encode(), head.keep)
            self.write(answer.whole(wrong.status, error_body(self._endpoint.dialect, wrong.status, wrong.why)))
            self.done(answer.keep)
            return
        self._exchange = exchange = self._start(head, request)
        exchange.begin()

    def _start(self, head: Head, request: Incoming) -> Exchange | Everywhere:
        if self._endpoint.routed:
            return Exchange(self, self._house, head, self._endpoint, request)
        pools = self._house.pools
        named = head.single.get(b"x-kvd-worker", b"").decode("latin-1")
        if named in pools:
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
        if not keep or self._house.draining:
            self._ended = True
            self._deadline = self._house.loop.time() + self._limits.send_s
            self._transport.close()
            return
        ahead = len(self._inbox)
        self._deadline = self._house.loop.time() + (self._limits.head_s if ahead else self._limits.idle_s)
        if ahead > _AHEAD_BYTES:
            self._transport.resume_reading()
        if ahead:
            # Not at once: a thousand requests in one packet must not be a thousand calls deep.
            self._house.loop.call_soon(self._next)

    def _next(self) -> None:
        if not self._ended and self._exchange is None and self._head is None:
            self._advance()

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

    def check(self, now: float) -> None:
        """Called about four times a second."""
        if self._exchange is not None:
            self._exchange.check(now, self._limits.silence_s)
        if now < self._deadline:
            return
        self._deadline = _FOREVER
        if self._ended or self.paused:
            self.cut()
        elif self.idle:
            self.close()
        else:
            self._house.counts["late"] += 1
            self._refuse(408, "the request did not arrive in time")

    def close(self) -> None:
        """Close the connection, whatever is on it. Idempotent."""
        self._ended = True
        if self._transport is not None:
            self._transport.close()

    def _leave(self) -> None:
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange.leave()
        self._release()
