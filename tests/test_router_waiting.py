"""When every worker is busy: requests wait their turn, not beyond their deadline, and never too many."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvd.router.tenants import digest
from tests.harness import eventually
from tests.router_harness import MockWorker, Router, drain, post, until

ASKED = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 2}}


@pytest.fixture
def worker() -> Iterator[MockWorker]:
    with MockWorker(hold=True) as running:
        yield running


@pytest.fixture
def router(worker: MockWorker, tmp_path: Path) -> Iterator[Router]:
    """One request at a time; two may wait."""
    with Router(tmp_path, worker.url, queue__each=1, queue__waiting=2) as running:
        yield running


def waiting(router: Router) -> float:
    return router.metrics()["steering_waiting"]


def test_they_are_served_in_order(router: Router, worker: MockWorker) -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(router.connect()) for _ in range(3)]
        for n, sock in enumerate(socks):
            sock.sendall(post("/generate", ASKED | {"text": "a " * (n + 1)}))
            eventually(lambda n=n: waiting(router) == n)  # type: ignore[misc]
        for n, sock in enumerate(socks):
            eventually(lambda n=n: len(worker.requests) == n + 1)  # type: ignore[misc]
            worker.step()
            worker.step()
            assert b"[DONE]" in until(sock, b"0\r\n\r\n")
    assert [seen["body"].count("a ") for seen in worker.requests] == [1, 2, 3]


def test_one_too_many_is_told_when_to_come_back(router: Router) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(router.connect()).sendall(post("/generate", ASKED))
        eventually(lambda: waiting(router) == 2)
        reply = router.talk(post("/generate", ASKED, "connection: close"))
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 2\r\n" in reply
    assert b"too many requests wait" in reply


def test_nobody_waits_beyond_its_deadline(router: Router, worker: MockWorker) -> None:
    with router.connect() as sock:
        sock.sendall(post("/generate", ASKED))
        eventually(lambda: worker.requests)
        reply = router.talk(post("/generate", ASKED, "connection: close", "x-kvd-timeout-s: 0.2"))
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"no worker was free in time" in reply
    assert len(worker.requests) == 1


def test_who_leaves_no_longer_waits(router: Router, worker: MockWorker) -> None:
    with router.connect() as first:
        first.sendall(post("/generate", ASKED))
        eventually(lambda: worker.requests)
        with router.connect() as second:
            second.sendall(post("/generate", ASKED))
            eventually(lambda: waiting(router) == 1)
        eventually(lambda: waiting(router) == 0)
        assert router.talk(post("/echo", b"hi", "connection: close")).endswith(b"hi"), "what generates nothing"
    eventually(lambda: router.metrics()[f'steering_running{{worker="{worker.url}"}}'] == 0)


def test_the_tenant_that_has_most_waiting_makes_room(worker: MockWorker, tmp_path: Path) -> None:
    keys = "".join(f'[{name}]\nsha256 = ["{digest(name.encode()).hex()}"]\n' for name in ("many", "few"))
    (tmp_path / "keys.toml").write_text(keys)
    (tmp_path / "secret").write_bytes(b"0123456789abcdef")
    files = {"tenants__keys_file": tmp_path / "keys.toml", "tenants__secret_file": tmp_path / "secret"}
    with Router(tmp_path, worker.url, queue__each=1, queue__waiting=2, **files) as router, ExitStack() as stack:
        socks = [stack.enter_context(router.connect()) for _ in range(4)]
        for n, (sock, name) in enumerate(zip(socks, ("many", "many", "many", "few"), strict=True)):
            sock.sendall(post("/generate", ASKED, f"authorization: Bearer {name}", "connection: close"))
            eventually(lambda n=n: waiting(router) == min(n, 2))  # type: ignore[misc]
        assert drain(socks[2]).startswith(b"HTTP/1.1 429 "), "the newest of the tenant that has most"
        for _ in range(6):
            worker.step()
        for sock in (socks[0], socks[1], socks[3]):
            assert b"[DONE]" in drain(sock)
