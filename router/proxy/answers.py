"""An answer on its way to a client: the head once, the body framed as the head said, and an end that shows. Pure.

Each method says what is to be written; whoever calls writes it in one piece.
"""

import json

from kvd.router.proxy.headers import LAST_CHUNK, Fields, framed, response_head
from kvd.router.proxy.strict import Head

_BODILESS = frozenset({204, 304})
JSON = (b"content-type", b"application/json")


class Answer:
    """To the request with this `head`; None for one that could not be read."""

    __slots__ = ("_chunked", "_head", "_request_id", "_silent", "keep", "started")

    def __init__(self, head: Head | None, request_id: bytes, keep: bool) -> None:
        self._head = head
        self._request_id = request_id
        self.keep = keep  # the connection outlives it
        self.started = False
        self._chunked = False
        self._silent = False  # no body, whatever arrives

    def begin(self, status: int, fields: Fields, length: int | None) -> bytes:
        """The head. `length` None: not known yet."""
        assert not self.started, "one head"
        self.started = True
        head = self._head
        bodiless = status in _BODILESS
        self._silent = bodiless or (head is not None and head.method == "HEAD")
        if length is None and not self._silent:
            self._chunked = head is not None and head.minor == 1
            self.keep = self.keep and self._chunked
        shown = None if bodiless else length
        kept = b"keep-alive" if head is not None and head.minor == 0 else b""  # 1.0 closes where that is not said
        return response_head(status, fields, self._request_id, shown, self._chunked, kept if self.keep else b"close")

    def body(self, data: bytes) -> bytes:
        """More of it."""
        if not data or self._silent:
            return b""
        return framed(data) if self._chunked else data

    def end(self) -> bytes:
        return LAST_CHUNK if self._chunked else b""

    def whole(self, status: int, body: bytes, fields: Fields = (JSON,)) -> bytes:
        """A short answer of our own, all of it."""
        return self.begin(status, fields, len(body)) + self.body(body)


def plain_error(status: int, why: str) -> bytes:
    """For a request that was not understood so far as to know its dialect."""
    return json.dumps({"error": {"message": why, "type": "invalid_request_error", "code": status}}).encode()
