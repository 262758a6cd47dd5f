"""Clients that do not take their answers, ask ahead and leave: what they make the router hold is bounded, and ends."""

import socket
from collections.abc import Iterator

import psutil
import pytest

from tests.harness import eventually
from tests.router_harness import MockWorker, Router, post

PAGE = b"GET /kvd/metrics HTTP/1.1\r\nhost: x\r\n\r\n"
STREAM = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 9}}
LIMIT_S = 1.0


@pytest.fixture(scope="module")
def router(mock: MockWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    limits = {f"limits__{name}_s": LIMIT_S for name in ("send", "head", "body", "idle")}
    with Router(tmp_path_factory.mktemp("router"), mock.url, **limits) as running:
        yield running


def narrow(router: Router) -> socket.socket:
    """A connection that takes a few kilobytes, and then nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", router.port))
    return sock


def clients(router: Router) -> float:
    return router.metrics()["clients"] - 1  # who asks this is one


def running(router: Router) -> float:
    return sum(value for name, value in router.metrics().items() if name.startswith("steering_running"))


def test_pages_for_one_that_reads_nothing_are_not_written_for_ever(router: Router) -> None:
    held = psutil.Process(router.process.pid).memory_info().rss
    cut = False
    with narrow(router) as sock:
        for _ in range(1000):
            try:
                sock.sendall(PAGE * 1000)
            except (ConnectionResetError, BrokenPipeError):
                cut = True
                break
    assert cut
    assert psutil.Process(router.process.pid).memory_info().rss - held < 64 << 20


def test_one_that_reads_nothing_is_cut_with_its_next_request(router: Router) -> None:
    with narrow(router) as sock:
        sock.sendall(PAGE * 1200 + post("/generate", STREAM))
        eventually(lambda: not clients(router), 5 * LIMIT_S)
        assert running(router) == 0


def test_one_that_asks_for_nothing_more_and_reads_nothing_is_cut(router: Router) -> None:
    """Less than the router waits for a client to take, more than the kernel holds."""
    socks = [narrow(router) for _ in range(10)]
    try:
        for number, sock in enumerate(socks):
            sock.sendall(PAGE * (400 + 20 * number))
        eventually(lambda: not clients(router), 8 * LIMIT_S)
    finally:
        for sock in socks:
            sock.close()


def test_one_that_asked_far_ahead_and_left_is_noticed(router: Router, mock: MockWorker) -> None:
    mock.set(silent=True)
    try:
        with router.connect() as sock:
            sock.sendall(post("/generate", {"text": "a"}))
            eventually(lambda: running(router) == 1, 5)
            sock.sendall(post("/echo", b"x" * 200_000))
        eventually(lambda: running(router) == 0 and not clients(router), 5)
    finally:
        mock.set(silent=False)


def test_what_was_asked_ahead_is_answered_once_there_is_room(router: Router) -> None:
    asked = 3000
    with narrow(router) as sock:
        sock.sendall(PAGE * asked)
        received = bytearray()
        while received.count(b"HTTP/1.1 200 ") < asked:
            data = sock.recv(1 << 16)
            assert data, received[-200:]
            received += data
