"""Launch a real SGLang server on the CPU, talk to it, and leave nothing behind.

    with SglangServer(venv, model, log, page_size=64, hicache=HiCache(storage_backend="file")) as server:
        cold = server.generate(text="...")
        server.flush_cache()
        assert server.generate(text="...").cached.storage

Stdlib only; blocking; one server per object, which can be started again after `stop` or `kill`.
A server lives in a session of its own. A guard process holds the other end of a pipe from us and ends that
session when we are gone, however we went, so a killed test run leaves no server.
Never does: run SGLang in this process, pass on its PYTHONPATH or SGLANG_* variables (only `env` counts), or
touch processes and files that are not its own server's.
"""

import contextlib
import http.client
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tools.sglang_cpu import session
from tools.sglang_cpu.endpoint import HOST, Endpoint, RequestRefused
from tools.sglang_cpu.session import bury, shared_memory_of

PORTS = range(16_000, 22_000)  # nobody else draws these: SGLang does from there on, and the kernel from 32,768 on

# Layout and io backend go together; these are the pairs the CPU platform has copies for.
LAYOUTS = (
    ("layer_first", "direct"),
    ("layer_first", "kernel"),
    ("page_first", "kernel"),
    ("page_first_direct", "direct"),
    ("page_head", "kernel"),
)


class ServerFailed(RuntimeError):
    """The server died, or did not get ready or quiet in time; ends with the tail of its log."""


@dataclass(frozen=True)
class HiCache:
    """SGLang's hierarchical cache: a host pool of `ratio` times the device pool, and storage behind it."""

    layout: str = "page_first_direct"
    io_backend: str = "direct"
    ratio: float = 2.0
    write_policy: str = "write_through"
    storage_backend: str | None = None  # "file", "dynamic"...
    extra_config: Mapping[str, Any] = field(default_factory=dict)  # "dynamic": backend_name, module_path...
    prefetch_policy: str = "wait_complete"
    prefetch_threshold: int = 16  # tokens; SGLang's own default, 256, never asks storage about short prompts

    def arguments(self) -> list[str]:
        arguments = ["--enable-hierarchical-cache", "--hicache-ratio", str(self.ratio)]
        arguments += ["--hicache-mem-layout", self.layout, "--hicache-io-backend", self.io_backend]
        arguments += ["--hicache-write-policy", self.write_policy]
        if self.storage_backend:
            arguments += ["--hicache-storage-backend", self.storage_backend]
            arguments += ["--hicache-storage-prefetch-policy", self.prefetch_policy]
            arguments += ["--hicache-storage-backend-extra-config", json.dumps(self.extra())]
        return arguments

    def extra(self) -> dict[str, Any]:
        """What SGLang calls the storage backend's extra config."""
        return {"prefetch_threshold": self.prefetch_threshold, **self.extra_config}


class SglangServer(Endpoint):
    def __init__(
        self,
        venv: Path,
        model: Path,
        log: Path,
        *,
        port: int | None = None,
        page_size: int = 64,
        dtype: str = "float32",  # several times faster than bfloat16 where the CPU has no bfloat16 units
        max_total_tokens: int = 8192,
        tp_size: int = 1,
        hicache: HiCache | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        ready_timeout_s: float = 300.0,
    ) -> None:
        self.venv = venv.absolute()
        self.model = model.absolute()
        self.log = log.absolute()
        super().__init__(port or free_port(), secrets.token_hex(8), str(self.model))
        self.ready_timeout_s = ready_timeout_s
        self._hicache = hicache
        self._settings = {
            "--model-path": str(self.model),
            "--host": HOST,
            "--port": str(self.port),
            "--device": "cpu",
            "--dtype": dtype,
            "--page-size": str(page_size),
            "--max-total-tokens": str(max_total_tokens),
            # Never reached: max_total_tokens decides. What other processes take meanwhile counts against it, though.
            "--mem-fraction-static": "0.5",
            "--tp-size": str(tp_size),
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
            "--admin-api-key": self.admin_key,
        }
        self._args = list(args)
        self._env = dict(env or {})
        if tp_size > 1:  # SGLang on a CPU wants to be told which core each rank may use
            cores = sorted(os.sched_getaffinity(0))
            bind = "|".join(str(cores[rank % len(cores)]) for rank in range(tp_size))
            self._env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", bind)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None
        self._shared_memory: set[Path] = set()

    def __repr__(self) -> str:
        state = f"pid {self._process.pid}" if self._process else "not started"
        return f"SglangServer(port {self.port}, {state}, log {self.log})"

    # Life

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the HTTP process, which leads the session the other processes are in."""
        assert self._process, "the server is not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Started, and not ended by us; it may have died by itself."""
        return self._process is not None

    def command(self) -> list[str]:
        words = [word for setting in self._settings.items() for word in setting]
        flags = ["--disable-overlap-schedule", "--skip-server-warmup", "--enable-cache-report"]
        cache = self._hicache.arguments() if self._hicache else []
        python = str(self.venv / "bin" / "python")
        return [python, "-W", "ignore", "-m", "sglang.launch_server", *words, *flags, *cache, *self._args]

    def start(self) -> None:
        """Launch and return at once; the log is started over."""
        assert self._process is None, "already started"
        self._scratch = Path(tempfile.mkdtemp(prefix="sgl-"))  # short: SGLang puts Unix sockets in it
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(self._scratch),
                start_new_session=True,
            )
        guard = [sys.executable, "-S", session.__file__, str(self._process.pid), str(self._scratch)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)

    def wait_ready(self, timeout_s: float | None = None) -> float:
        """Until the server has generated a token; how long that took. A dead server fails at once."""
        begin = time.monotonic()
        self._until(self._is_healthy, timeout_s or self.ready_timeout_s, "not ready")
        return time.monotonic() - begin

    def stop(self, timeout_s: float = 20.0) -> None:
        """Ask the server to end, then end what is left of it. May be called twice, and after `kill`."""
        if self._process and self._process.poll() is None:
            self._shared_memory |= shared_memory_of(self.pid)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to every process of the server, at once, as a crash would; then clean up after it."""
        if self._process is None or self._scratch is None or self._guard is None:
            return
        bury(self._process.pid, self._scratch, self._shared_memory)
        self._process.wait()
        self._guard.communicate(b"nothing left to do")
        self._process = self._guard = self._scratch = None

    def log_tail(self, lines: int = 40) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(no log: {error})"

    # Requests

    def flush_cache(self, timeout_s: float = 60.0) -> None:
        """Empty the device and host caches. SGLang refuses while storage work is pending: keep asking."""
        self._until(lambda: self._agrees("POST", "/flush_cache"), timeout_s, "would not flush its cache")

    def attach_storage(
        self,
        backend: str,
        extra_config: Mapping[str, Any],
        prefetch_policy: str = "wait_complete",
        write_policy: str = "write_through",
    ) -> None:
        """At run time; SGLang refuses unless it was started with a HiCache and is idle."""
        body = {
            "hicache_storage_backend": backend,
            "hicache_storage_backend_extra_config_json": json.dumps(extra_config),
            "hicache_storage_prefetch_policy": prefetch_policy,
            "hicache_write_policy": write_policy,
        }
        self.request("PUT", "/hicache/storage-backend", body)

    def detach_storage(self) -> None:
        self.request("DELETE", "/hicache/storage-backend")

    # Inside

    def _environment(self, scratch: Path) -> dict[str, str]:
        ours = ("SGLANG_", "PYTHON", "VIRTUAL_ENV")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return {
            **inherited,
            "PATH": f"{self.venv / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "TMPDIR": str(scratch),
            "TORCH_EXTENSIONS_DIR": str(self.venv / "torch_extensions"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "SGLANG_HOST_IP": HOST,
            # Its default is one folder for the whole machine, where another server's pages would be hits.
            "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(scratch / "hicache"),
            **self._env,
        }

    def _is_healthy(self) -> bool:
        try:
            return self._agrees("GET", "/health")
        except (OSError, http.client.HTTPException):
            return False  # not listening yet, or busy

    def _agrees(self, method: str, path: str) -> bool:
        try:
            self.request(method, path, timeout_s=30)
        except RequestRefused:
            return False
        return True

    def _until(self, done: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            if self._process is None or self._process.poll() is not None:
                status = self._process.returncode if self._process else "never started"
                raise ServerFailed(f"{self!r} died (exit {status}):\n{self.log_tail()}")
            # Noted while it lives: a server that dies by itself has no map to read them from.
            self._shared_memory |= shared_memory_of(self._process.pid)
            if done():
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self!r} {otherwise} after {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(0.2)


def free_port() -> int:
    """One that nobody listens on now; taken at random, so that parallel runs seldom meet."""
    for port in random.sample(PORTS, k=200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise OSError(f"no free port in {PORTS}")
