"""Whatever bytes come: what is accepted means to a lenient parser behind us exactly what it meant to us. Pure."""

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.router.proxy.headers import request_head
from kvd.router.proxy.inbox import Inbox
from kvd.router.proxy.strict import Chunks, Head, Malformed

SEEDS = (
    b"POST /a?b=c HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: keep-alive, x-a\r\nx-a: \t b \r\n\r\n",
    b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 44\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\nx-long: 1\r\n\r\n",
)
NASTY = (
    b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"5", b"\x0b", b"\x80", b"\xff", b"chunked",
    b"transfer-encoding: chunked\r\n",
    b"content-length: 5\r\n", b"content-length: 0\r\n", b"\r\n ", b"0\r\n\r\n", b"+", b"_",
)  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), st.sampled_from(NASTY)), max_size=4)


class Behind:
    """A worker's parser."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.urls: list[bytes] = []
        self.names: list[bytes] = []

    def on_message_begin(self) -> None:
        self.bodies.append(b"")
        self.urls.append(b"")

    def on_url(self, url: bytes) -> None:
        self.urls[-1] += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.names.append(name)

    def on_body(self, body: bytes) -> None:
        self.bodies[-1] += body


def inbox(sent: bytes = b"") -> Inbox:
    made = Inbox(4096, 1024)
    made.add(sent)
    return made


def accepted(received: Inbox) -> tuple[Head, bytes] | None:
    """The next request, if it is whole and fine."""
    head = received.head()
    body = received.body(head) if head is not None else None
    return (head, body) if head is not None and body is not None else None


def meant(received: Inbox) -> object:
    """What the next request says, or why it is refused."""
    try:
        found = accepted(received)
    except Malformed as refused:
        return refused.status, refused.why
    if found is None:
        return None
    head, body = found
    fields = [pair for pair in head.fields if pair[0] != b"content-length"]
    return head.method, head.target, head.minor, fields, head.length, head.chunked, head.keep, head.nominated, body


@given(st.sampled_from(SEEDS), EDITS)
def test_what_is_passed_on_is_one_request(seed: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    sent = inbox(edited(seed, edits))
    status, why = 400, "more has to come"
    try:
        while (found := accepted(sent)) is not None:
            head, body = found
            behind = Behind()
            parser = httptools.HttpRequestParser(behind)
            parser.feed_data(request_head(head, b"worker:1", len(body), b"id", False) + body)
            assert behind.urls == [head.target]
            assert behind.bodies == [body]
            assert behind.names.count(b"content-length") <= 1
            assert b"transfer-encoding" not in behind.names
    except Malformed as refused:
        status, why = refused.status, refused.why
    assert 400 <= status <= 505
    assert why


def edited(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    sent = bytearray(seed)
    for at, drop, put in edits:
        at %= len(sent) + 1
        sent[at : at + drop] = put
    return bytes(sent)


@given(st.sampled_from(SEEDS), EDITS)
def test_what_was_read_before_does_not_change_what_is_read(seed: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    """The last head is remembered: the next one means what it would mean to somebody who has forgotten everything."""
    sent = edited(seed, edits)
    before = inbox(seed)
    assert accepted(before) is not None
    rest = len(before)
    before.add(sent)
    if not rest:
        assert meant(before) == meant(inbox(sent))


def test_a_head_that_is_the_same_but_for_its_length_is_read_once() -> None:
    one = inbox(SEEDS[0])
    first = accepted(one)
    one.add(SEEDS[0].replace(b"Length: 5", b"Length: 11") + b" again")
    second = accepted(one)
    assert first is not None
    assert second is not None
    assert first[0] is second[0]
    assert (second[0].length, second[1]) == (11, b"hello again")
    one.add(SEEDS[0].replace(b"Length: 5", b"Length: "))
    with pytest.raises(Malformed, match="content-length is not a number"):
        one.head()


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_may_come_in_any_pieces(seed: bytes) -> None:
    whole, pieces, found = accepted(inbox(seed)), inbox(), []
    head = None
    for byte in seed:
        pieces.add(bytes([byte]))
        head = head or pieces.head()
        if head is not None and (body := pieces.body(head)) is not None:
            found.append((head, body))
            head = None
    assert found[:1] == [whole]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_chunks_may_come_in_any_pieces(size: int) -> None:
    sent = b"5\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\nnext"
    chunks, received, whole = Chunks(100), bytearray(), False
    for at in range(0, len(sent), size):
        received += sent[at : at + size]
        whole = whole or chunks.take(received)
    assert whole
    assert chunks.body == b"hello0123456789"
    assert received == b"next"
