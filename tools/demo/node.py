"""The demo's processes: one kvd, two SGLang workers, in a scratch folder of their own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvd import wire
from kvd.client import Link
from kvd.errors import Unavailable
from kvd.places import SOCKET, arena_path
from tools.sglang_cpu.server import HiCache, SglangServer

ROOT = Path(__file__).resolve().parents[2]
VENV, MODEL = ROOT / ".venvs/sglang", ROOT / ".models/smollm2-135m"
LOGS = ROOT / ".logs"
PAGE_TOKENS = 64


class Kvd:
    """A real `kvd` process, one node's. `kill` is kill -9; `shared` is where it and other nodes keep their files."""

    def __init__(self, shared: Path, name: str, arena_mib: int = 1024) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvd-demo-"))
        self.socket = self.folder / SOCKET
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("KVD_")},
            "KVD_RUN_DIR": str(self.folder),
            "KVD_ARENA__SIZE_BYTES": str(arena_mib << 20),
            "KVD_NVME__PATH": str(self.folder / "nvme"),
            "KVD_NVME__SIZE_BYTES": str(2 << 30),
            "KVD_SHARED__URI": str(shared),
            "KVD_SHARED__NODE": name,
            "KVD_SHARED__QUOTA_BYTES": str(2 << 30),
            "KVD_SHARED__WRITE_DELAY_S": "2",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        LOGS.mkdir(exist_ok=True)
        with (LOGS / "kvd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvd.main"], env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                self.status()
            except Unavailable:
                if self._process.poll() is not None:
                    break
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(f"kvd did not start, see {LOGS / 'kvd.log'}")

    def status(self) -> wire.Status:
        link = Link(self.socket, "tool", "demo", None, 5.0)
        try:
            return link.ask(wire.GetStatus(), wire.Status, 5.0)
        finally:
            link.close()

    def wait_for_workers(self, count: int, timeout_s: float = 30) -> None:
        """Until that many are attached with their circuits closed."""
        deadline = time.monotonic() + timeout_s
        while sum(w.circuit == "closed" and bool(w.pools) for w in self.status().workers) < count:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{count} workers did not attach; see the logs in {LOGS}")
            time.sleep(0.05)

    def wait_until_written(self, timeout_s: float = 30) -> None:
        """Until the lower tiers have every page."""
        deadline = time.monotonic() + timeout_s
        while any(tier.counters["waiting_to_be_written"] for tier in self.status().tiers[1:]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the lower tiers do not take the pages; see {LOGS / 'kvd.log'}")
            time.sleep(0.05)

    def wait_for_tiers(self, timeout_s: float = 20) -> None:
        """Until the lower tiers are open."""
        deadline = time.monotonic() + timeout_s
        while trouble := [tier.trouble for tier in self.status().tiers if tier.trouble]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"a lower tier does not open: {trouble[0]}")
            time.sleep(0.05)

    def kill(self, and_memory: bool = False) -> None:
        """kill -9; `and_memory` takes its RAM tier too, as a reboot does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        if and_memory:
            arena_path(self.folder, os.getuid()).unlink()

    def stop(self) -> None:
        """A clean stop, which also removes the arena."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(20)
        shutil.rmtree(self.folder / "nvme", ignore_errors=True)
        (self.folder / "kvd.log").unlink(missing_ok=True)
        (self.folder / "kvd.lock").unlink(missing_ok=True)
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def extra_config(socket: Path) -> dict[str, Any]:
    """What the README tells an operator to give to SGLang."""
    return {
        "backend_name": "kvd",
        "module_path": "kvd.sidecar.hicache",
        "class_name": "KvdStorage",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "kvd": {"socket": str(socket)},
    }


def worker(name: str, kvd: Kvd, **options: Any) -> SglangServer:
    """An SGLang server with kvd as its storage, not started."""
    cache = HiCache(storage_backend="dynamic", extra_config=extra_config(kvd.socket))
    return SglangServer(VENV, MODEL, LOGS / f"{name}.log", page_size=PAGE_TOKENS, hicache=cache, **options)
