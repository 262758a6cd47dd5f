"""HTTP routers under load: mock workers and a load generator in C, built at run time, and the routers between them.

Each router is started on four mock workers, and asked alone. What a router costs is the CPU time of its processes,
children included, while the load was counted.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.router_harness import free_port
from tools.bench._peers import Missing, end, made_environment
from tools.bench._table import ROOT

HERE = Path(__file__).resolve().parent
SGLANG_ROUTER = "sglang-router==0.3.2"
WORKERS = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one load. Rates per second; latency in seconds, of requests or of events."""

    requests: float
    events: float
    cores: float  # the router used
    p50_s: float
    p99_s: float


class Tools:
    """The two C programs."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise Missing("no C compiler: install one (Debian: gcc)")
        self.mock, self.load = folder / "http_mock", folder / "http_load"
        for program in (self.mock, self.load):
            source = HERE / f"_{program.name}.c"
            subprocess.run([compiler, "-O2", "-o", str(program), str(source)], check=True)


@contextmanager
def mock(tools: Tools, port: int, table: Path | None = None) -> Iterator[None]:
    """One mock worker; `table`: what it answers besides (see _http_mock.c)."""
    command = [str(tools.mock), str(port), *([str(table)] if table is not None else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        _kill(process)


@contextmanager
def mocks(tools: Tools) -> Iterator[list[int]]:
    """The ports of mock workers that tell nothing of their tokens."""
    with ExitStack() as stack:
        ports = [free_port() for _ in range(WORKERS)]
        for port in ports:
            stack.enter_context(mock(tools, port))
        yield ports


@dataclass(frozen=True, slots=True)
class Running:
    """A router; without a process: a worker, asked directly."""

    name: str
    port: int
    process: "subprocess.Popen[bytes] | None"


def direct(ports: Sequence[int]) -> Running:
    return Running("direct", ports[0], None)


@contextmanager
def kvd_router(ports: Sequence[int], folder: Path, name: str = "kvd-router", events: str = "") -> Iterator[Running]:
    """`events`: where the workers' node publishes; "": it knows nothing of what they hold."""
    port = free_port()
    command = [sys.executable, "-m", "kvd.router.main", "--port", str(port)]
    command += [word for worker in ports for word in ("--worker", f"http://127.0.0.1:{worker}")]
    nodes = {"KVD_ROUTER_NODES": json.dumps([{"events": events}])} if events else {}
    with _started(name, command, port, "/kvd/health", folder, os.environ | nodes) as running:
        yield running


@contextmanager
def sglang_router(ports: Sequence[int], folder: Path, policy: str) -> Iterator[Running]:
    venv = made_environment("sglang-router", [SGLANG_ROUTER], "sglang-router")
    port = free_port()
    command = [str(venv / "bin" / "python"), "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--policy", policy, "--prometheus-port", str(free_port()), "--log-level", "error"]
    command += ["--worker-urls", *(f"http://127.0.0.1:{worker}" for worker in ports)]
    with _started(f"sglang-router {policy}", command, port, "/health", folder) as running:
        yield running


@contextmanager
def bare(
    ports: Sequence[int], folder: Path, name: str = "bare uvloop", model: Path | None = None
) -> Iterator[Running]:
    """What a router in Python costs before it decides anything; with a model, one that only steers by its tokens."""
    port = free_port()
    by_tokens = [] if model is None else ["--tokens", str(model)]
    command = [sys.executable, str(HERE / "_http_bare.py"), *by_tokens, str(port), *map(str, ports)]
    with _started(name, command, port, "/", folder) as running:
        yield running


@contextmanager
def nginx(ports: Sequence[int], folder: Path) -> Iterator[Running]:
    program = shutil.which("nginx")
    if program is None:
        raise Missing("nginx is not installed (Debian: nginx-light)")
    port = free_port()
    servers = "".join(f"server 127.0.0.1:{worker};" for worker in ports)
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.err; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;\n"
        f"fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
        "client_max_body_size 64m; client_body_buffer_size 1m; keepalive_requests 1000000000;\n"
        f"upstream workers {{ least_conn; {servers} keepalive 128; keepalive_requests 1000000000; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://workers; proxy_http_version 1.1;\n"
        'proxy_set_header Connection ""; proxy_buffering off; } } }\n'
    )
    with _started("nginx", [program, "-c", str(config), "-e", f"{folder}/nginx.err"], port, "/", folder) as running:
        yield running


def load(tools: Tools, router: Running, connections: int, seconds: float, bodies: Path) -> Measured:
    """Put this load on it. Raises Missing when any request failed."""
    command = [str(tools.load), str(router.port), str(connections), str(seconds), str(bodies)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    before = after = 0.0
    last = ""
    for line in process.stdout:
        if line == "counting\n":
            before = _cpu_s(router)
        elif line == "counted\n":
            after = _cpu_s(router)
        last = line
    _, said = process.communicate()
    numbers = last.split()
    if process.returncode or len(numbers) != 6 or int(numbers[2]):
        raise Missing(f"{router.name} failed under load: {said.strip()[:200] or last}")
    requests, events, _, took, p50, p99 = map(float, numbers)
    return Measured(requests / took, events / took, (after - before) / took, p50 / 1e6, p99 / 1e6)


def _cpu_s(router: Running) -> float:
    if router.process is None:
        return 0.0
    root = psutil.Process(router.process.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


@contextmanager
def _started(
    name: str, command: list[str], port: int, health: str, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Running]:
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors, cwd=ROOT, env=env)
    try:
        until = time.monotonic() + 60
        while not _answers(port, health):
            if process.poll() is not None or time.monotonic() > until:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise Missing(f"{name} did not start: {lines[-1] if lines else 'without a word'}")
            time.sleep(0.1)
        yield Running(name, port, process)
    finally:
        process.terminate()
        end(process)


def _answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as reply:
            return bool(reply.status == 200)
    except (TimeoutError, urllib.error.URLError, OSError):
        return False


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
