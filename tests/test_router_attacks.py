"""What attackers send: each gets its refusal, and a worker sees one request or none. Raw sockets, real processes."""

import json
import re
import socket
import time
from collections.abc import Iterator

import pytest

from tests.harness import eventually
from tests.router_harness import MockWorker, Router, accepted, drain, post, until

HELLO = post("/echo", b"hello")


@pytest.fixture(scope="module")
def router(mock: MockWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    limits = {"limits__head_s": 0.6, "limits__body_s": 0.6, "limits__body_bytes": 1 << 20, "limits__head_bytes": 16384}
    with Router(tmp_path_factory.mktemp("router"), mock.url, **limits, listen__clients=64) as running:
        yield running


@pytest.fixture(autouse=True)
def forget(mock: MockWorker) -> None:
    mock.forget()


def request(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
HOST = "host: x"
POST = "POST /echo HTTP/1.1"
CHUNKED = "transfer-encoding: chunked"
ATTACKS = {
    # What a request's end is
    "length and chunked": (request(POST, HOST, "content-length: 5", CHUNKED, body=b"0\r\n\r\n" + SMUGGLED), 400),
    "chunked and length": (request(POST, HOST, CHUNKED, "content-length: 5", body=b"0\r\n\r\n" + SMUGGLED), 400),
    "two lengths": (request(POST, HOST, "content-length: 5", "content-length: 0", body=b"hello"), 400),
    "the same length twice": (request(POST, HOST, "content-length: 5", "content-length: 5", body=b"hello"), 400),
    "a list of lengths": (request(POST, HOST, "content-length: 5, 5", body=b"hello"), 400),
    "a signed length": (request(POST, HOST, "content-length: +5", body=b"hello"), 400),
    "a hexadecimal length": (request(POST, HOST, "content-length: 0x5", body=b"hello"), 400),
    "a length beyond all numbers": (request(POST, HOST, "content-length: " + "9" * 40), 400),
    "an empty length": (request(POST, HOST, "content-length:", body=b"hello"), 400),
    "chunked twice": (request(POST, HOST, CHUNKED, CHUNKED, body=b"0\r\n\r\n"), 400),
    "chunked, then not": (request(POST, HOST, "transfer-encoding: chunked, identity", body=b"0\r\n\r\n"), 400),
    "gzip, then chunked": (request(POST, HOST, "transfer-encoding: gzip, chunked", body=b"0\r\n\r\n"), 400),
    "xchunked": (request(POST, HOST, "transfer-encoding: xchunked", body=b"0\r\n\r\n"), 400),
    "chunked with a vertical tab": (request(POST, HOST, "transfer-encoding: \x0bchunked", body=b"0\r\n\r\n"), 400),
    "chunked in HTTP/1.0": (request("POST /echo HTTP/1.0", HOST, CHUNKED, body=b"0\r\n\r\n"), 400),
    # What a chunk is
    "a chunk extension": (request(POST, HOST, CHUNKED, body=b"5;a=b\r\nhello\r\n0\r\n\r\n"), 400),
    "a chunk size with a bare LF": (request(POST, HOST, CHUNKED, body=b"5\nhello\r\n0\r\n\r\n"), 400),
    "a chunk size with a sign": (request(POST, HOST, CHUNKED, body=b"+5\r\nhello\r\n0\r\n\r\n"), 400),
    "a chunk size with 0x": (request(POST, HOST, CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n"), 400),
    "a chunk size with a space": (request(POST, HOST, CHUNKED, body=b"5 \r\nhello\r\n0\r\n\r\n"), 400),
    "a chunk that is longer": (request(POST, HOST, CHUNKED, body=b"5\r\nhelloo\r\n0\r\n\r\n"), 400),
    "no chunk size": (request(POST, HOST, CHUNKED, body=b"\r\nhello\r\n0\r\n\r\n"), 400),
    "trailers": (request(POST, HOST, CHUNKED, body=b"0\r\ncontent-length: 5\r\n\r\n"), 400),
    "a huge chunk": (request(POST, HOST, CHUNKED, body=b"ffffffff\r\n"), 413),
    "a chunk size that overflows": (request(POST, HOST, CHUNKED, body=b"fffffffffffffffff\r\n"), 400),
    # What a line is
    "a folded header": (request("GET /echo HTTP/1.1", HOST, "x-a: 1", " folded"), 400),
    "a space before the colon": (request("GET /echo HTTP/1.1", HOST, "content-length : 5"), 400),
    "a header without a name": (request("GET /echo HTTP/1.1", HOST, ": 5"), 400),
    "a header without a colon": (request("GET /echo HTTP/1.1", HOST, "content-length"), 400),
    "a NUL in a value": (request("GET /echo HTTP/1.1", HOST, "x-a: a\0b"), 400),
    "a bare LF in a head": (b"GET /echo HTTP/1.1\nhost: x\n\n", 400),
    "a bare LF after a header": (b"GET /echo HTTP/1.1\r\nhost: x\ncontent-length: 5\r\n\r\n", 400),
    "a bare CR in a value": (b"GET /echo HTTP/1.1\r\nhost: x\r\nx-a: a\rb\r\n\r\n", 400),
    "an empty line first": (b"\r\n" + request("GET /echo HTTP/1.1", HOST), 400),
    # What is asked, and of whom
    "no host": (request("GET /echo HTTP/1.1"), 400),
    "two hosts": (request("GET /echo HTTP/1.1", HOST, "host: y"), 400),
    "a host with a path": (request("GET /echo HTTP/1.1", "host: x/y"), 400),
    "two authorizations": (request("GET /echo HTTP/1.1", HOST, "authorization: a", "authorization: b"), 400),
    "an unknown expectation": (request(POST, HOST, "content-length: 5", "expect: 200-ok"), 417),
    "an absolute target": (request("GET http://y/echo HTTP/1.1", HOST), 400),
    "a target that is no path": (request("GET echo HTTP/1.1", HOST), 400),
    "a fragment": (request("GET /echo#a HTTP/1.1", HOST), 400),
    "a space in the target": (request("GET /ec ho HTTP/1.1", HOST), 400),
    "a byte above 127 in the target": (request("GET /\xff HTTP/1.1", HOST), 400),
    "two spaces": (request("GET  /echo HTTP/1.1", HOST), 400),
    "CONNECT": (request("CONNECT /echo HTTP/1.1", HOST), 405),
    "TRACE": (request("TRACE /echo HTTP/1.1", HOST), 405),
    "a method in brackets": (request("G(T /echo HTTP/1.1", HOST), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/0.9": (b"GET /echo\r\n\r\n", 400),
    "HTTP/1.2": (request("GET /echo HTTP/1.2", HOST), 505),
    "TLS": (bytes.fromhex("16030100a5010000a10303") + b"\0" * 200 + b"\r\n\r\n", 400),
    # How much
    "a long target": (request("GET /" + "a" * 9000 + " HTTP/1.1", HOST), 414),
    "an endless target": (b"GET /" + b"a" * 20000, 414),
    "a large header": (request("GET /echo HTTP/1.1", HOST, "x-a: " + "a" * 20000), 431),
    "many headers": (request("GET /echo HTTP/1.1", HOST, *["a: b"] * 200), 431),
    "endless headers": (b"GET /echo HTTP/1.1\r\n" + b"a: b\r\n" * 4000, 431),
    "a large body": (request(POST, HOST, f"content-length: {1 << 30}"), 413),
    "a large body that is announced": (request(POST, HOST, f"content-length: {1 << 30}", "expect: 100-continue"), 413),
}  # fmt: skip


def test_each_is_refused_and_no_worker_sees_it(router: Router, mock: MockWorker) -> None:
    got = {name: answers(router.talk(sent)) for name, (sent, _) in ATTACKS.items()}
    assert got == {name: [status] for name, (_, status) in ATTACKS.items()}, "what follows a refusal is no request"
    assert mock.requests == []


def test_after_a_good_request_each_is_refused_all_the_same(router: Router, mock: MockWorker) -> None:
    """In one packet: the first is answered, the second refused, and what was in the second goes nowhere."""
    got = {name: answers(router.talk(HELLO + sent)) for name, (sent, _) in ATTACKS.items()}
    assert got == {name: [200, status] for name, (_, status) in ATTACKS.items()}
    assert [seen["target"] for seen in mock.requests] == ["/echo"] * len(ATTACKS)


def answers(reply: bytes) -> list[int]:
    """The statuses in what came back, the last with the connection's end."""
    assert b"connection: close\r\n" in reply
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", reply)]


def test_what_a_worker_gets_is_written_afresh(router: Router, mock: MockWorker) -> None:
    """However the body was framed and whatever was meant for us: one request, one length, all of it."""
    sent = request(
        POST, HOST, "Transfer-Encoding: Chunked", "Connection: keep-alive, x-secret", "x-secret: 1", "Keep-Alive: 5",
        "TE: trailers", "Upgrade: h2c", "X-Kept:  yes ", "proxy-authorization: Basic x",
        body=b"3\r\nhel\r\n002\r\nlo\r\n0\r\n\r\n",
    )  # fmt: skip
    with router.connect() as sock:
        sock.sendall(sent)
        assert until(sock, b"hello")
    (raw,) = mock.seen["connections"]
    head, _, body = raw.partition("\r\n\r\n")
    lines = head.split("\r\n")
    assert lines[0] == "POST /echo HTTP/1.1"
    assert body == "hello"
    names = [line.partition(":")[0] for line in lines[1:]]
    assert sorted(names) == ["content-length", "host", "x-kept", "x-kvd-request-id"]
    assert "content-length: 5" in lines
    assert "x-kept: yes" in lines


def test_requests_in_one_packet_are_answered_in_order(router: Router, mock: MockWorker) -> None:
    with router.connect() as sock:
        sock.sendall(b"".join(post("/echo", b"number %d" % n) for n in range(50)))
        reply = until(sock, b"number 49")
    assert [reply.index(b"number %d" % n) for n in range(50)] == sorted(
        reply.index(b"number %d" % n) for n in range(50)
    )
    assert [seen["body"] for seen in mock.requests] == [f"number {n}" for n in range(50)]


def test_a_body_byte_by_byte_is_one_request(router: Router, mock: MockWorker) -> None:
    with router.connect() as sock:
        for byte in post("/echo", b"hi"):
            sock.send(bytes([byte]))
        assert until(sock, b"hi").startswith(b"HTTP/1.1 200")
    assert len(mock.requests) == 1


@pytest.mark.parametrize("sent", [b"", b"GET /echo HT", b"GET /echo HTTP/1.1\r\nhost: x\r\n", HELLO[:-2]])
def test_who_is_slow_to_ask_is_sent_away(router: Router, mock: MockWorker, sent: bytes) -> None:
    reply = router.talk(sent)
    assert reply.startswith(b"HTTP/1.1 408 ") if sent else reply == b""
    assert mock.requests == []


def test_who_drips_a_head_is_sent_away(router: Router, mock: MockWorker) -> None:
    """A byte now and then does not move the deadline."""
    with router.connect() as sock:
        sock.settimeout(0.05)
        sock.sendall(b"GET /echo HTTP/1.1\r\nhost: x\r\n")
        reply, started = b"", time.monotonic()
        while not reply and time.monotonic() - started < 5:
            try:
                sock.sendall(b"a")
                reply = sock.recv(4096)
            except TimeoutError:
                continue
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert mock.requests == []


def test_a_body_larger_than_allowed_is_refused_while_it_comes(router: Router, mock: MockWorker) -> None:
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    reply = router.talk(request(POST, HOST, "transfer-encoding: chunked") + chunk * 20)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert mock.requests == []


def test_an_announced_body_is_asked_for(router: Router, mock: MockWorker) -> None:
    with router.connect() as sock:
        sock.sendall(request(POST, HOST, "content-length: 5", "expect: 100-continue"))
        assert until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hello")
        assert until(sock, b"hello").startswith(b"HTTP/1.1 200")
    (seen,) = mock.requests
    assert "expect" not in dict(seen["headers"])


def test_deep_json_harms_nobody(router: Router, mock: MockWorker) -> None:
    """It is the worker's to refuse; the router does not fall over it."""
    mock.set(status=400)
    try:
        assert router.talk(post("/generate", b"[" * 500_000, "connection: close")).startswith(b"HTTP/1.1 400 ")
    finally:
        mock.set(status=200)
    assert len(mock.requests) == 1


def test_bytes_that_are_no_text_are_the_workers_to_refuse(router: Router, mock: MockWorker) -> None:
    mock.set(status=400)
    try:
        reply = router.talk(post("/generate", b'{"text": "caf\xe9"}', "connection: close"))
    finally:
        mock.set(status=200)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert len(mock.requests) == 1


def test_too_many_connections_are_turned_away_and_room_comes_back(router: Router) -> None:
    held = [router.connect() for _ in range(64)]
    try:
        eventually(lambda: router_is_full(router), 5)
    finally:
        for sock in held:
            sock.close()
    eventually(lambda: router.talk(post("/echo", b"hi", "connection: close")).startswith(b"HTTP/1.1 200"), 5)


def router_is_full(router: Router) -> bool:
    with router.connect() as sock:
        sock.settimeout(1)
        return drain(sock).startswith(b"HTTP/1.1 503 ")


def test_http_1_0_is_answered_and_closed(router: Router) -> None:
    reply = router.talk(b"GET /model_info HTTP/1.0\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in reply
    with router.connect() as sock:  # unless it asks for more: then it is told so
        for _ in range(2):
            sock.sendall(b"GET /model_info HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
            assert b"\r\nconnection: keep-alive\r\n" in until(sock, b"}")
    sent = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 2}}
    reply = router.talk(post("/generate", sent).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"transfer-encoding" not in reply
    assert reply.endswith(b"data: [DONE]\n\n")


def test_an_answer_to_head_has_no_body(router: Router) -> None:
    with router.connect() as sock:
        sock.sendall(b"HEAD /kvd/health HTTP/1.1\r\nhost: x\r\n\r\n" + HELLO)
        reply = until(sock, b"hello")
    first, _, rest = reply.partition(b"\r\n\r\n")
    assert b"content-length: 3" in first
    assert rest.startswith(b"HTTP/1.1 200 ")


def test_the_request_id_is_the_clients_if_it_is_sane(router: Router, mock: MockWorker) -> None:
    reply = router.talk(post("/echo", b"a", "x-kvd-request-id: mine-1", "connection: close"))
    assert b"x-kvd-request-id: mine-1\r\n" in reply
    reply = router.talk(post("/echo", b"a", "x-kvd-request-id: <b>", "connection: close"))
    assert b"<b>" not in reply
    given = [dict(seen["headers"])["x-kvd-request-id"] for seen in mock.requests]
    assert given[0] == "mine-1"
    assert f"x-kvd-request-id: {given[1]}\r\n".encode() in reply


def test_a_worker_that_answers_twice_is_not_believed(tmp_path: object, router: Router) -> None:
    """Bytes after an answer are nobody's answer: not this client's, not the next one's."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Router(router.log.parent, url) as other, other.connect() as sock:
            sock.sendall(post("/flush_cache", b""))
            with accepted(listening) as upstream:
                upstream.sendall(
                    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"
                )
                reply = until(sock, b"}")
    assert reply.startswith(b"HTTP/1.1 502 ")
    assert b"bad" not in reply
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == 502
