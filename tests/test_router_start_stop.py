"""One router has a port, whatever its processes are; and it says how it stops."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import eventually
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
