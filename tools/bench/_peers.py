"""Reference systems: each in an environment of its own under `.venvs/`, driven as a process by lines of JSON.

A peer's script sits beside this file, needs nothing of ours, times its own calls, and answers one line for each
line it is sent. `start_peer` returns why it cannot run, where it cannot: the benchmark then reports it as missing.
"""

import ctypes.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.bench._table import ROOT, progress

HERE = Path(__file__).resolve().parent
VENVS = ROOT / ".venvs"
MOONCAKE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"
VERBS = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")  # what its wheel links and does not carry


class Missing(Exception):
    """A reference that cannot run here, and why."""


@dataclass(slots=True)
class Peer:
    """A running peer. One that `rests` stands still while it is not asked: what it does later is no other's cost."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    rests: bool = False

    def ask(self, timeout_s: float = 60.0, **request: object) -> dict[str, float]:
        """Send one request and wait for its answer. Raises Missing when the peer is dead, late or failed."""
        self.process.send_signal(signal.SIGCONT)
        try:
            return self._ask(timeout_s, request)
        finally:
            if self.rests:
                self.process.send_signal(signal.SIGSTOP)

    def _ask(self, timeout_s: float, request: Mapping[str, object]) -> dict[str, float]:
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise Missing(self._last_words()) from None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise Missing(f"{self.name} did not answer within {timeout_s:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise Missing(self._last_words())
        answer: dict[str, float] = json.loads(line)
        if "error" in answer:
            raise Missing(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{self.name} ended: {lines[-1] if lines else 'without a word'}"


@contextmanager
def start_peer(
    name: str,
    environment: Path,
    script: str,
    arguments: Sequence[str],
    folder: Path,
    env: Mapping[str, str] | None = None,
) -> Iterator[Peer]:
    """Run `script` with the environment's Python until the block ends. Its stderr goes to a log in `folder`."""
    log = folder / f"{name}.log"
    command = [str(environment / "bin" / "python"), "-u", str(HERE / script), *arguments]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            env={**os.environ, **(env or {})},
        )
    try:
        yield Peer(name, process, log)
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Close its stdin and wait; a process that does not go is killed. Idempotent."""
    process.send_signal(signal.SIGCONT)
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def sglang_environment() -> Path:
    """The environment that tools/sglang_cpu makes; made here when it is not there yet."""
    venv = VENVS / "sglang"
    if not (venv / ".sglang-cpu.json").exists():
        progress("setting up SGLang in .venvs/sglang (some minutes, once)")
        _run(["python3", str(ROOT / "tools" / "sglang_cpu" / "setup_env.py"), "--venv", str(venv)])
    return venv


def made_environment(name: str, packages: Sequence[str], what: str) -> Path:
    """`.venvs/NAME` with these packages; made here when it is not there yet. Raises Missing where that fails."""
    venv = VENVS / name
    stamp = venv / ".bench"
    if not stamp.exists() or stamp.read_text() != repr(tuple(packages)):
        progress(f"setting up {what} in .venvs/{name}")
        _run(["python3", "-m", "venv", "--clear", str(venv)])
        _run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages])
        stamp.write_text(repr(tuple(packages)))
    return venv


def mooncake_environment() -> tuple[Path, dict[str, str]]:
    """The environment and the variables that its programs need."""
    venv = VENVS / "mooncake"
    stamp = venv / ".bench"
    if not stamp.exists() or stamp.read_text() != MOONCAKE:
        progress("setting up Mooncake Store in .venvs/mooncake (a minute, once)")
        _run(["python3", "-m", "venv", "--clear", str(venv)])
        _run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", MOONCAKE, "numpy"])
        if ctypes.util.find_library("ibverbs") is None:
            _unpack_verbs(venv / "verbs")
        stamp.write_text(MOONCAKE)
    libraries = {str(path.parent) for path in (venv / "verbs").rglob("lib*.so.*")}
    env = {"MC_TCP_BIND_ADDRESS": "127.0.0.1", "MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"}
    return venv, {**env, "LD_LIBRARY_PATH": ":".join(sorted(libraries))} if libraries else env


def _unpack_verbs(target: Path) -> None:
    """Put the RDMA libraries that Mooncake links beside it, without installing them."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Missing("Mooncake needs libibverbs.so.1: install it (Debian: libibverbs1)")
    target.mkdir(exist_ok=True)
    try:
        _run(["apt-get", "download", *VERBS], target)
    except Missing:
        _run(["apt-get", "update", "-qq"])
        _run(["apt-get", "download", *VERBS], target)
    for package in target.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(target)])


def _run(command: list[str], folder: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise Missing(f"`{' '.join(command[:4])} ...` failed: {said[-1] if said else done.returncode}")


@contextmanager
def file_peer(folder: Path, store: Path) -> Iterator[Peer]:
    """SGLang's own `file` storage backend, keeping its files under `store`."""
    with start_peer("sglang-file", sglang_environment(), "_peer_file.py", [str(store)], folder) as peer:
        peer.ask(do="hello")
        yield peer


@contextmanager
def mooncake_peer(folder: Path, segment_bytes: int) -> Iterator[Peer]:
    """Mooncake Store on loopback TCP: a master, a process that owns the memory, and the client we drive."""
    venv, env = mooncake_environment()
    master = next(venv.glob("lib/python3*/site-packages/mooncake/mooncake_master"))
    port = 20000 + os.getpid() % 20000
    with ExitStack() as stack:
        with (folder / "mooncake-master.log").open("wb") as log:
            process = subprocess.Popen(
                [str(master), f"-rpc_port={port}", "-rpc_address=127.0.0.1", f"-metrics_port={port + 1}",
                 "-metrics_host=127.0.0.1"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **env},
            )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.terminate)
        time.sleep(1.0)
        for role, size in (("owner", segment_bytes), ("client", 0)):
            arguments = [f"127.0.0.1:{port}", str(size)]
            peer = stack.enter_context(
                start_peer(f"mooncake-{role}", venv, "_peer_mooncake.py", arguments, folder, env)
            )
            peer.ask(do="hello")
        yield peer
