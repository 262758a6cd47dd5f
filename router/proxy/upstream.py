"""One connection to a worker: one request at a time, its answer handed on as it arrives.

It is used again (see kvd.router.proxy.pool) only after an answer that ended by itself and left nothing behind.
Never here: the meaning of an answer, retries, the client.
"""

import asyncio
import socket
from typing import Protocol, cast

import httptools

from kvd.errors import KvdError

_BODILESS = frozenset({204, 304})
_MAX_HEAD_BYTES = 65536


class Lost(KvdError):
    """The worker did not take the request, or left before its answer was whole."""


class Receiver(Protocol):
    """Whom an answer is for. All calls come from the event loop, in this order."""

    def answer(
        self, status: int, fields: list[tuple[bytes, bytes]], length: int | None, body: bytes, whole: bool
    ) -> None:
        """The head came, and with it this much of the body. `length` of the body, None where the worker did not say.
        `whole`: there is no more."""

    def more(self, body: bytes, whole: bool) -> None:
        """More of the body."""

    def lost(self, why: str) -> None:
        """The connection ended before the answer was whole; after it, nothing."""


class Owner(Protocol):
    """Who keeps connections."""

    def made(self, connection: "Connection") -> None:
        """It is open."""

    def rest(self, connection: "Connection") -> None:
        """It is idle and may be used again."""

    def forget(self, connection: "Connection") -> None:
        """It is closed."""


class Connection(asyncio.Protocol):
    """One connection to a worker."""

    __slots__ = (
        "_excess", "_fields", "_head_bytes", "_keep", "_method", "_once", "_owner", "_parser", "_parts", "_paused",
        "_receiver", "_status", "_told", "_transport", "_whole",
    )  # fmt: skip

    def __init__(self, owner: Owner, once: bool) -> None:
        self._owner = owner
        self._once = once
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._paused = False
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._excess = False  # bytes came after the end
        self._expect("")

    def _expect(self, method: str) -> None:
        """An answer to a request with this method. The answer before was whole, or there was none."""
        self._method = method
        self._fields: list[tuple[bytes, bytes]] = []
        self._status = 0  # 0 until the head is whole
        self._told = False  # the receiver has the head
        self._whole = False
        self._keep = False  # the worker leaves the connection open after this
        self._head_bytes = 0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, method: str, head: bytes, body: bytes, receiver: Receiver) -> None:
        """Send one request; its answer goes to `receiver`. The connection must be idle."""
        assert self._receiver is None, "one request at a time"
        assert self._transport is not None
        self._expect(method)
        self._receiver = receiver
        if len(body) < 16384:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def abandon(self) -> None:
        """Nobody wants the answer: close now, which is how a worker learns of it. Idempotent."""
        self._receiver = None
        if self._transport is not None:
            self._transport.abort()

    def cut(self, why: str) -> None:
        """End it; who waits for an answer is told."""
        self._lose(why)

    def pause(self) -> None:
        """Take nothing more from the worker for now."""
        if self.usable and not self._paused:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self.usable and self._paused:
            assert self._transport is not None
            self._paused = False
            self._transport.resume_reading()

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._owner.made(self)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:  # a worker that speaks out of turn
            self.abandon()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._lose("the worker wants another protocol")
            return
        except httptools.HttpParserError as error:
            self._lose(f"the worker's answer is not HTTP: {error}")
            return
        if not self._status:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._lose("the worker's answer has too large a head")
            return
        if self._excess:
            self._lose("the worker sent more than its answer")
            return
        self._hand_on(receiver)

    def _hand_on(self, receiver: Receiver) -> None:
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        whole = self._whole
        if whole:  # before the receiver is told: it may want a connection for its next request
            self._receiver = None
        if not self._told:
            self._told = True
            receiver.answer(self._status, self._fields, self._length(), body, whole)
        elif body or whole:
            receiver.more(body, whole)
        if whole:
            if self._keep and not self._once and self._method != "HEAD" and self.usable:
                if self._paused:  # its last reader was slow: the next one is another
                    self.resume()
                self._owner.rest(self)
            else:
                self.abandon()

    def _length(self) -> int | None:
        for name, value in self._fields:
            if name == b"content-length" and value.isdigit():
                return int(value)
        return None

    def _lose(self, why: str) -> None:
        receiver = self._receiver
        self.abandon()
        if receiver is not None:
            receiver.lost(why)

    def connection_lost(self, error: Exception | None) -> None:
        receiver, self._receiver = self._receiver, None
        self._transport = None
        self._owner.forget(self)
        if receiver is None:
            return
        if self._status and not self._whole and self._ends_with_connection() and error is None:
            receiver.more(b"", True)
            return
        receiver.lost(f"the worker closed the connection{f': {error}' if error else ''}")

    def _ends_with_connection(self) -> bool:
        return not any(name in (b"content-length", b"transfer-encoding") for name, _ in self._fields)

    # httptools

    def on_message_begin(self) -> None:
        if self._whole:
            self._excess = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._excess:
            self._fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._excess:
            return
        status = self._parser.get_status_code()
        if status < 200 and status != 101:
            self._fields.clear()
            return
        self._status = status
        self._keep = self._parser.should_keep_alive()
        if self._method == "HEAD" or status in _BODILESS:
            self._whole = True

    def on_body(self, body: bytes) -> None:
        if not self._excess:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._status:
            self._whole = True
