"""What a client sent, taken apart strictly: one request means the same to everybody, or it is refused. Pure.

llhttp and every server behind us read some bytes differently (a bare LF, a folded header, two lengths, a chunk
extension): that difference is what request smuggling is made of. So a head must match one grammar as a whole, a body
has exactly one way to end, and neither is passed on as it came: `kvd.router.proxy.headers` writes a new head.

    head  = METHOD SP /target SP HTTP/1.x CRLF  (name ":" value CRLF)*  CRLF     names: tokens; values: no CR, LF, NUL
    chunk = size-in-hex CRLF bytes CRLF                                          no extensions, no trailers
"""

import re
from dataclasses import dataclass, field

METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
MAX_TARGET_BYTES = 8192
MAX_FIELDS = 100
_MAX_CHUNK_LINE = 16
_REQUEST = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]+) HTTP/([0-9])\.([0-9])\r\n")
_FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++:[\t -~\x80-\xff]*+\r\n"
_FIELDS = re.compile(rb"(?:" + _FIELD + rb")*+\r\n")
_PAIR = re.compile(rb"([^:]++):([^\r]*+)\r\n")  # of what _FIELDS matched
_HOST = re.compile(rb"[0-9A-Za-z.\-_:\[\]]+")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_SIZE = re.compile(rb"[0-9A-Fa-f]{1,8}")
_LONE = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|\0")  # a line end that is not CRLF
# Twice is twice a meaning. Others may repeat: their values are a list by definition.
_ONCE = frozenset(
    {b"host", b"content-length", b"transfer-encoding", b"content-type", b"content-encoding", b"authorization"}
    | {b"x-api-key", b"expect", b"x-kvd-request-id", b"x-kvd-timeout-s", b"x-kvd-worker"}
)


class Malformed(Exception):
    """A request that is refused: the status to answer with, and why, in words for the client."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


@dataclass(slots=True)
class Head:
    """A request's head. `fields` are (name in lower case, value) in the order they came, but for content-length."""

    method: str
    target: bytes
    minor: int
    fields: list[tuple[bytes, bytes]]
    length: int = 0  # of the body, in bytes; 0 when it is chunked
    chunked: bool = False
    expects: bool = False  # it waits for "100 Continue" before it sends its body
    keep: bool = True  # the connection outlives the answer
    single: dict[bytes, bytes] = field(default_factory=dict)  # those of _ONCE that are there
    nominated: frozenset[bytes] = frozenset()  # by `connection`: meant for us alone
    path: str = ""  # the target without its query
    passed_on: bytes = field(default=b"", compare=False)  # as kvd.router.proxy.headers wrote it for a worker

    def __post_init__(self) -> None:
        self.path = self.target.partition(b"?")[0].decode("ascii")


def head_end(received: bytes | bytearray, most: int, seen: int = 0) -> int:
    """Where the head at the front of `received` ends, its empty line included; 0 while more has to come.

    `most`: bytes of a head. `seen`: how many bytes were there the last time: they are not looked at again.
    Raises Malformed.
    """
    end = received.find(b"\r\n\r\n", max(0, seen - 3), most)
    if end >= 0:
        return end + 4
    if len(received) >= most:
        at_line_end = received.find(b"\r\n", 0, most) < 0
        raise Malformed(414, "the target is too long") if at_line_end else Malformed(431, "the head is too large")
    if (lone := _LONE.search(received, max(0, seen - 1))) is not None:
        raise Malformed(400, f"byte {lone.start()} is not allowed in a head")
    if len(received) > MAX_TARGET_BYTES + 64 and received.find(b"\r\n", 0, MAX_TARGET_BYTES + 64) < 0:
        raise Malformed(414, f"the target is longer than {MAX_TARGET_BYTES} bytes")
    return 0


def read(head: bytes) -> Head:
    """A head with its empty line. Raises Malformed."""
    line = _REQUEST.match(head)
    if line is None:
        raise Malformed(400, "the request line is malformed")
    method, target, major, minor = line.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        raise Malformed(505, "only versions 1.0 and 1.1 of HTTP are spoken")
    if (name := method.decode("ascii")) not in METHODS:
        raise Malformed(405, f"method {name} is not served")
    if len(target) > MAX_TARGET_BYTES:
        raise Malformed(414, f"the target is longer than {MAX_TARGET_BYTES} bytes")
    if target[0] != 0x2F or b"#" in target:
        raise Malformed(400, "the target must be a path")
    if _FIELDS.fullmatch(head, line.end()) is None:
        raise Malformed(400, "a header is malformed")
    fields = [(name.lower(), value.strip(b" \t")) for name, value in _PAIR.findall(head, line.end(), len(head) - 2)]
    if len(fields) > MAX_FIELDS:
        raise Malformed(431, f"more than {MAX_FIELDS} headers")
    return _framed(Head(name, target, minor[0] - 0x30, fields))


def _framed(head: Head) -> Head:
    """Where its body ends and whether the connection goes on: each in one way only."""
    single = head.single
    for name, value in head.fields:
        if name in _ONCE:
            if name in single:
                raise Malformed(400, f"header {name.decode()} is there twice")
            single[name] = value
    host = single.get(b"host")
    if host is None and head.minor == 1:
        raise Malformed(400, "header host is missing")
    if host and _HOST.fullmatch(host) is None:
        raise Malformed(400, "header host is malformed")
    length, coding = single.get(b"content-length"), single.get(b"transfer-encoding")
    if coding is not None:
        if length is not None or head.minor == 0:
            raise Malformed(400, "transfer-encoding beside content-length, or in HTTP/1.0")
        if coding.lower() != b"chunked":
            raise Malformed(400, "transfer-encoding can only be chunked")
        head.chunked = True
    elif length is not None:
        if _LENGTH.fullmatch(length) is None:
            raise Malformed(400, "content-length is not a number")
        head.length = int(single.pop(b"content-length"))
        head.fields = [pair for pair in head.fields if pair[0] != b"content-length"]
    if (expect := single.get(b"expect")) is not None:
        if expect.lower() != b"100-continue":
            raise Malformed(417, "only 100-continue can be expected")
        head.expects = head.minor == 1
    head.keep = head.minor == 1
    said = [value.lower() for name, value in head.fields if name == b"connection"]
    if said:
        head.nominated = frozenset(option.strip() for option in b",".join(said).split(b","))
        head.keep = b"close" not in head.nominated and (head.keep or b"keep-alive" in head.nominated)
    return head


class Chunks:
    """A chunked body as it arrives. Bounded: by `most` bytes of body."""

    def __init__(self, most: int) -> None:
        self.body = bytearray()
        self._most = most
        self._left = 0  # bytes of the current chunk that are still to come, and its CRLF
        self._last = False

    def take(self, received: bytearray) -> bool:
        """Move what belongs to the body from the front of `received`; True once it is whole. Raises Malformed."""
        while True:
            if self._left > 2:
                part = received[: self._left - 2]
                self.body += part
                self._left -= len(part)
                del received[: len(part)]
            if self._left > 2:
                return False
            if self._left:
                if len(received) < 2:
                    return False
                if received[:2] != b"\r\n":
                    raise Malformed(400, "trailers" if self._last else "a chunk that is longer than it says")
                del received[:2]
                self._left = 0
                if self._last:
                    return True
            if not self._read_size(received):
                return False

    def _read_size(self, received: bytearray) -> bool:
        end = received.find(b"\n", 0, _MAX_CHUNK_LINE)
        if end < 0:
            if len(received) >= _MAX_CHUNK_LINE:
                raise Malformed(400, "a chunk's size is malformed")
            return False
        line = bytes(received[:end])
        if not line.endswith(b"\r") or _SIZE.fullmatch(line[:-1]) is None:
            raise Malformed(400, "a chunk's size is malformed")
        size = int(line[:-1], 16)
        if len(self.body) + size > self._most:
            raise Malformed(413, f"the body is larger than {self._most} bytes")
        del received[: end + 1]
        self._last = size == 0
        self._left = size + 2
        return True
