"""What ends just as a request comes: an idle connection, a worker that leaves, a process that starts. Real routers."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil

from tests.harness import eventually
from tests.router_harness import ROOT, MockWorker, Router, accepted, drain, free_port, post, until

EMPTY = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}"


def test_an_idle_connection_that_just_ended_is_no_fault_of_its_worker(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Router(tmp_path, f"http://127.0.0.1:{listening.getsockname()[1]}") as router,
    ):

        def serve() -> None:
            with accepted(listening) as first:
                first.sendall(EMPTY)
                until(first, b"}")  # the second request, whole: its answer is that nobody is there any more
            for _ in range(2):
                with accepted(listening) as again:
                    again.sendall(EMPTY)

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(3):
            reply = router.talk(post("/generate", {"text": "a"}, "connection: close"))
            assert reply.startswith(b"HTTP/1.1 200 "), reply
        thread.join(5)
        assert router.metrics()['steering_outcomes_total{outcome="answered"}'] == 3


def test_an_order_for_a_worker_that_leaves_meanwhile_is_nobody_elses(tmp_path: Path) -> None:
    with MockWorker() as named, MockWorker() as other, Router(tmp_path, named.url, other.url) as router:
        order = post("/release_memory_occupation", {"tags": []}, "connection: close", f"x-kvd-worker: {named.url}")
        with router.connect() as sock:
            sock.sendall(order[:-3])
            remove = post("/kvd/workers/remove", {"worker": named.url}, "connection: close")
            assert router.talk(remove).startswith(b"HTTP/1.1 200 ")
            sock.sendall(order[-3:])
            assert drain(sock).startswith(b"HTTP/1.1 404 ")
        assert other.requests == []


def test_one_workers_answer_has_its_own_type(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Router(tmp_path, url) as router:

            def serve() -> None:
                with accepted(listening) as sock:
                    sock.sendall(EMPTY)

            thread = threading.Thread(target=serve)
            thread.start()
            ask = f"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-kvd-worker: {url}\r\n\r\n"
            assert b"\r\ncontent-type: text/plain\r\n" in router.talk(ask.encode())
            thread.join(5)


def test_where_one_process_dies_while_it_starts_all_end(tmp_path: Path) -> None:
    env = os.environ | {"KVD_ROUTER_LISTEN__PROCESSES": "2"}
    command = [sys.executable, "-m", "kvd.router.main", "--port", str(free_port()), "--worker", "http://127.0.0.1:9"]
    with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE) as parent:
        children = psutil.Process(parent.pid).children
        try:
            eventually(lambda: len(children()) == 2, 30)
            children()[0].send_signal(signal.SIGKILL)
            assert parent.wait(30) == 1
        finally:
            parent.kill()
