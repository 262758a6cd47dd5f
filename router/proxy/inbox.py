"""What one client sent and was not answered: whole heads and bodies, taken apart by kvd.router.proxy.strict. Pure.

Most requests come in one piece: then nothing is copied but the body, once. And the heads of one client are the same
but for the length of the body: the last one is remembered, and one like it is not taken apart again.

Held at most: `head_bytes` of a head, or what it announced and `body_bytes` allow; beyond the request that is asked for
it is the caller's to stop reading.
"""

import re

from kvd.router.proxy.strict import Chunks, Head, head_end, read

_MOST_DIGITS = 15
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)
_REMEMBERED_BYTES = 4096  # of a head; there is one for every connection


class Inbox:
    """Of one connection. In turns: `head` until there is one, then `body` until it is there."""

    __slots__ = (
        "_after", "_before", "_begins", "_body_bytes", "_chunks", "_head_bytes", "_known", "_received", "_seen",
    )  # fmt: skip

    def __init__(self, head_bytes: int, body_bytes: int) -> None:
        self._head_bytes = head_bytes
        self._body_bytes = body_bytes
        self._received: bytes | bytearray = b""
        self._seen = 0  # of it, bytes that hold no whole head
        self._begins = 0  # where the body does
        self._chunks: Chunks | None = None
        self._before = self._after = b""  # the last head, before and after the digits of its length
        self._known: Head | None = None  # what it means

    def __len__(self) -> int:
        """Bytes that were not taken."""
        return len(self._received)

    def add(self, data: bytes) -> None:
        received = self._received
        if isinstance(received, bytearray):
            received += data
        elif received or self._chunks is not None:
            self._received = bytearray(received)
            self._received += data
        else:
            self._received = data

    def clear(self) -> None:
        """Forget everything."""
        self._received, self._chunks, self._known = b"", None, None

    def head(self) -> Head | None:
        """The next request's; None while more has to come. Valid until the next call. Raises Malformed."""
        received = self._received
        head = self._familiar(received)
        if head is not None:
            return head
        end = head_end(received, self._head_bytes, self._seen)
        if not end:
            self._seen = len(received)
            return None
        self._seen = 0
        head = self._unfamiliar(bytes(received[:end]))
        if head.chunked:
            self._received = bytearray(memoryview(received)[end:])
            self._chunks = Chunks(self._body_bytes)
        else:
            self._begins = end
        return head

    def _familiar(self, received: bytes | bytearray) -> Head | None:
        """The last head once more, if that is what comes: the same bytes, but for the digits of its length."""
        before, after = self._before, self._after
        if not received.startswith(before) or self._known is None:
            return None
        at = len(before)
        end = received.find(b"\r", at, at + _MOST_DIGITS + 1)
        if end < 0 or not received.startswith(after, end) or not (digits := received[at:end]).isdigit():
            return None
        self._seen = 0
        self._begins = end + len(after)
        self._known.length = int(digits)
        return self._known

    def _unfamiliar(self, text: bytes) -> Head:
        head = read(text)
        said = _LENGTH.search(text)
        if said is not None and len(text) <= _REMEMBERED_BYTES:
            self._before, self._after, self._known = text[: said.start(1)], text[said.end(1) :], head
        return head

    def body(self, head: Head) -> bytes | None:
        """All of it; None while more has to come. Raises Malformed."""
        received = self._received
        if self._chunks is not None:
            assert isinstance(received, bytearray)
            if not self._chunks.take(received):
                return None
            body, self._chunks = bytes(self._chunks.body), None
            return body
        end = self._begins + head.length
        if len(received) < end:
            return None
        body = bytes(memoryview(received)[self._begins : end])
        self._begins = 0
        if len(received) == end:
            self._received = b""
        elif isinstance(received, bytearray):
            del received[:end]
        else:
            self._received = bytearray(memoryview(received)[end:])
        return body

    @property
    def body_bytes(self) -> int:
        """Of a body that is not whole yet."""
        return len(self._received) - self._begins if self._chunks is None else len(self._chunks.body)

    @property
    def body_begun(self) -> bool:
        """Whether some of it is there."""
        return len(self._received) > self._begins
