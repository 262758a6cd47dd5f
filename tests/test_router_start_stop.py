"""One router has a port, whatever its processes are; and it says how it stops."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import eventually
from tests.router_answers import CHAT, chat_text, counted, payloads, unchunked
from tests.router_harness import MockWorker, Router, post, until

HELD = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 2}}


@pytest.fixture
def worker() -> Iterator[MockWorker]:
    with MockWorker() as running:
        yield running


def second(router: Router, worker: MockWorker, processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvd.router.main", "--worker", worker.url, "--port", str(router.port)]
    env = {"PATH": "/usr/bin", "KVD_ROUTER_LISTEN__PROCESSES": str(processes)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_second_router_on_a_port_is_refused_and_told_what_to_do(
    worker: MockWorker, tmp_path: Path, processes: int
) -> None:
    with Router(tmp_path, worker.url, listen__processes=processes) as router:
        for others in (1, 3):
            done = second(router, worker, others)
            assert done.returncode == 78
            assert f"127.0.0.1:{router.port}" in done.stderr
            assert "another kvd-router" in done.stderr
            assert "--port" in done.stderr
            assert len(done.stderr.splitlines()) == 1, done.stderr
        assert router.talk(post("/echo", b"hi", "connection: close")).endswith(b"hi")


@pytest.mark.parametrize("processes", [1, 3])
def test_a_router_starts_where_one_has_just_stopped(worker: MockWorker, tmp_path: Path, processes: int) -> None:
    """It closes connections first, so they wait at its port (TIME_WAIT)."""
    port = 0
    for _ in range(2):
        with Router(tmp_path, worker.url, port=port, listen__processes=processes) as router:
            port = router.port
            assert router.talk(post("/echo", b"hi", "connection: close")).endswith(b"hi")


def test_several_processes_share_the_port_and_say_who_speaks(worker: MockWorker, tmp_path: Path) -> None:
    with Router(tmp_path, worker.url, listen__processes=3) as router:
        eventually(lambda: router.log.read_text().count("serves 1 worker at") == 3)
        answered: set[int] = set()

        def all_answered() -> bool:
            answered.add(router.page("workers")["pid"])
            return len(answered) == 3

        eventually(all_answered)
    said = router.log.read_text()
    assert all(f"[{pid}]: stopped" in said for pid in answered), said


def test_who_is_stopped_while_it_starts_has_stopped_well(worker: MockWorker, tmp_path: Path) -> None:
    """One process serves already, the others may not have come so far as to hear of it in their own way."""
    for _ in range(3):
        Router(tmp_path, worker.url, listen__processes=4).stop()


def test_where_the_one_that_watches_is_killed_the_others_leave_the_port(worker: MockWorker, tmp_path: Path) -> None:
    router = Router(tmp_path, worker.url, listen__processes=2)
    eventually(lambda: router.log.read_text().count("serves 1 worker at") == 2)
    router.process.kill()
    router.process.wait()
    eventually(lambda: router.log.read_text().count(": stopped") == 2, 20)
    with Router(tmp_path, worker.url, port=router.port, listen__processes=2):
        pass


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_says_what_it_waits_for_and_a_second_signal_cuts_it(
    worker: MockWorker, tmp_path: Path, processes: int
) -> None:
    worker.set(hold=True)
    router = Router(tmp_path, worker.url, listen__processes=processes)
    try:
        with router.connect() as sock:
            sock.sendall(post("/generate", HELD))
            eventually(lambda: worker.requests)
            worker.step()
            until(sock, b"data:")
            router.process.send_signal(signal.SIGINT)
            eventually(lambda: "stopping: 1 in progress, for 60 s at most" in router.log.read_text())
            assert router.process.poll() is None

            def gone() -> bool:
                router.process.send_signal(signal.SIGINT)
                return router.process.poll() is not None

            eventually(gone, 20)
        assert router.process.returncode == 0, router.log.read_text()
        assert "stopped" in router.log.read_text()
    finally:
        router.stop()


def test_a_wait_that_is_no_number_is_refused(worker: MockWorker, tmp_path: Path) -> None:
    with Router(tmp_path, worker.url) as router:
        for wrong in ("abc", "-1", "1e3", "nan"):
            reply = router.talk(post("/generate", HELD, "connection: close", f"x-kvd-timeout-s: {wrong}"))
            assert reply.startswith(b"HTTP/1.1 400 "), reply
            assert b"x-kvd-timeout-s is a number" in reply
        assert worker.requests == []


def test_where_there_is_no_worker_nothing_is_said_of_others(tmp_path: Path) -> None:
    with Router(tmp_path, nodes='[{"events": "tcp://127.0.0.1:9"}]') as router:
        reply = router.talk(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"there is no worker" in reply


def test_help_says_what_repeats_and_how_it_ends() -> None:
    command = [sys.executable, "-m", "kvd.router.main", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "once for each" in " ".join(said.split())
    assert "78 when a setting is wrong" in " ".join(said.split())


def kept(port: int, stop: threading.Event) -> int:
    """Answers to a client that keeps its connection, and is never cut off on one that has been of use."""
    done = 0
    while not stop.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        used = False
        try:
            while not stop.is_set():
                connection.request(
                    "POST", "/v1/chat/completions", json.dumps(CHAT | {"max_tokens": 1, "stream": False})
                )
                answer = connection.getresponse()
                assert (answer.status, bool(answer.read())) == (200, True)
                done += 1
                if answer.will_close:
                    break
                used = True
        except ConnectionError:
            assert not used, "it was told that it may go on"
        finally:
            connection.close()
    return done


def test_a_router_restarts_under_load(tmp_path: Path) -> None:
    """The new one listens before the old one stops; what the old one had begun it ends."""
    with MockWorker() as first, MockWorker() as second:
        for worker in (first, second):
            worker.set(pace_s=0.02)
        taken_over(tmp_path, first, second)


def taken_over(tmp_path: Path, *workers: MockWorker) -> None:
    urls = [worker.url for worker in workers]
    old = Router(tmp_path, *urls)
    stop = threading.Event()

    def load(n: int) -> int:
        done = 0
        if n % 2:
            return kept(old.port, stop)
        while not stop.is_set():
            try:
                reply = old.talk(post("/v1/chat/completions", CHAT | {"max_tokens": 10}, "connection: close"), 10)
            except ConnectionError:
                continue
            if reply:  # a connection may be refused or reset while it is made; an answer that began is ended
                assert chat_text(payloads(unchunked(reply))) == counted(4, 13)
                done += 1
        return done

    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(load, n) for n in range(16)]
        try:
            eventually(lambda: sum(len(worker.requests) for worker in workers) > 32)
            with Router(tmp_path, *urls, port=old.port, take_over=True) as new:
                old.stop()
                before = new.metrics()["requests_total"]
                eventually(lambda: new.metrics()["requests_total"] > before + 32)
                stop.set()
                assert all(one.result(10) > 0 for one in running)
        finally:
            stop.set()
            old.stop()
