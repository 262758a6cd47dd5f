"""Real routers and mock workers for tests: started on free ports, killed in any way, asked over real sockets."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.harness import eventually

ROOT = Path(__file__).parents[1]


class MockWorker:
    """tests.mock_worker in a process."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1", **mood: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.mock_worker", str(port), host], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port, self.seed = map(int, self.process.stdout.readline().split())
        self.url = f"http://127.0.0.1:{self.port}"
        if mood:
            self.set(**mood)

    def set(self, **mood: object) -> None:
        self._ask("set", mood)

    def step(self) -> None:
        """Let one held event go."""
        self._ask("step", {})

    def reset(self) -> None:
        """As it was at its start, and nothing seen."""
        self._ask("reset", {})
        self.forget()

    def forget(self) -> None:
        self._ask("forget", {})

    @property
    def seen(self) -> dict[str, Any]:
        return self._ask("seen", {})

    @property
    def requests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.seen["requests"]
        return found

    def _ask(self, what: str, body: object) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/mock/{what}", data=json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as reply:
            said: dict[str, Any] = json.load(reply)
            return said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "MockWorker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Served:
    """Whatever listens at a port here."""

    port: int

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def talk(self, sent: bytes, timeout_s: float = 5.0) -> bytes:
        """Everything that comes back until the router closes, or says nothing for `timeout_s`."""
        with self.connect() as sock:
            sock.settimeout(timeout_s)
            with suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(sent)
            return drain(sock)


class Router(Served):
    """A real `kvd-router` process. `stop` checks that it ended well."""

    def __init__(
        self, folder: Path, *workers: str, port: int = 0, take_over: bool = False, **settings: object
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"router-{self.port}-{os.urandom(3).hex()}.log"
        env = {name: value for name, value in os.environ.items() if not name.startswith("KVD_")}
        env |= {f"KVD_ROUTER_{name.upper()}": str(value) for name, value in settings.items()}
        arguments = [word for worker in workers for word in ("--worker", worker)] + ["--take-over"] * take_over
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvd.router.main", "--port", str(self.port), *arguments],
                env=env, cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            eventually(self._ready, 60, "the router is ready")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _ready(self) -> bool:
        assert self.process.poll() is None, f"the router ended: {self.log.read_text()}"
        return "serves" in self.log.read_text()

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/kvd/metrics", timeout=10) as reply:
            lines = [line.rpartition(" ") for line in reply.read().decode().splitlines() if line[0] != "#"]
        return {name.removeprefix("kvd_router_"): float(value) for name, _, value in lines}

    def page(self, name: str, **asked: object) -> dict[str, Any]:
        """One of the router's own, in JSON."""
        query = "&".join(f"{key}={value}" for key, value in asked.items())
        with urllib.request.urlopen(f"{self.url}/kvd/{name}?{query}", timeout=10) as reply:
            said: dict[str, Any] = json.load(reply)
            return said

    def stop(self, timeout_s: float = 20.0) -> None:
        """A clean stop."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()
        said = self.log.read_text()
        assert self.process.returncode == 0, said
        assert "Traceback" not in said, said

    def __enter__(self) -> "Router":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


class ToldRouter(Served):
    """tests.told_router in processes that share a port."""

    def __init__(self, processes: int = 1) -> None:
        self.port = free_port() if processes > 1 else 0
        self._processes: list[subprocess.Popen[str]] = []
        command = [sys.executable, "-m", "tests.told_router"]
        for _ in range(processes):
            arguments = [str(self.port), str(processes)]
            self._processes.append(
                subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            )
        for process in self._processes:
            assert process.stdout is not None
            self.port = int(process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def __enter__(self) -> "ToldRouter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def drain(sock: socket.socket) -> bytes:
    received = b""
    try:
        while data := sock.recv(1 << 16):
            received += data
    except (TimeoutError, ConnectionResetError):
        pass
    return received


def accepted(listening: socket.socket) -> socket.socket:
    """The connection on which a client's next request came; what the router asks itself is not answered."""
    while True:
        sock, _ = listening.accept()
        if b"x-kvd-request-id" in until(sock, b"\r\n\r\n"):
            return sock
        sock.close()


def until(sock: socket.socket, ending: bytes) -> bytes:
    """What comes until these bytes have come."""
    received = bytearray()
    while ending not in received[-(1 << 17) :]:
        data = sock.recv(1 << 16)
        assert data, f"closed after {bytes(received)!r}"
        received += data
    return bytes(received)


def post(path: str, body: object, *headers: str) -> bytes:
    """A request as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: test", f"content-length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data
