"""An answer on its way to a client: the head once, the body framed as the head said, and an end that shows. Pure.

What it writes is collected until `take`, so that a small answer leaves in one piece.
"""

import json
from dataclasses import dataclass, field

from kvd.router.proxy.headers import LAST_CHUNK, Fields, framed, response_head
from kvd.router.proxy.strict import Head

_BODILESS = frozenset({204, 304})
_JSON = (b"content-type", b"application/json")


@dataclass(slots=True)
class Answer:
    """To the request with this `head`; None for one that could not be read."""

    head: Head | None
    request_id: bytes
    keep: bool  # the connection outlives it
    started: bool = False
    _chunked: bool = False
    _silent: bool = False  # no body, whatever arrives
    _out: list[bytes] = field(default_factory=list)

    def begin(self, status: int, fields: Fields, length: int | None) -> None:
        """`length` None: not known yet."""
        assert not self.started, "one head"
        self.started = True
        self._silent = status in _BODILESS or (self.head is not None and self.head.method == "HEAD")
        if length is None and not self._silent:
            self._chunked = self.head is not None and self.head.minor == 1
            self.keep = self.keep and self._chunked
        shown = None if status in _BODILESS else length
        self._out.append(response_head(status, fields, self.request_id, shown, self._chunked, self.keep))

    def body(self, data: bytes) -> None:
        if data and not self._silent:
            self._out.append(framed(data) if self._chunked else data)

    def end(self) -> None:
        if self._chunked:
            self._out.append(LAST_CHUNK)

    def take(self) -> bytes:
        """What is to be written now."""
        out = self._out
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return data

    def whole(self, status: int, body: bytes, fields: Fields = (_JSON,)) -> bytes:
        """A short answer of our own, all of it."""
        self.begin(status, fields, len(body))
        self.body(body)
        return self.take()


def plain_error(status: int, why: str) -> bytes:
    """For a request that was not understood so far as to know its dialect."""
    return json.dumps({"error": {"message": why, "type": "invalid_request_error", "code": status}}).encode()
