"""Real daemons for tests: started on a folder of their own, killed in any way, and checked for leaks at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kvd import wire
from kvd.client import Link
from kvd.ctl.verify import bookkeeping
from kvd.errors import Unavailable
from kvd.pages import chain
from kvd.places import DATA_SOCKET, SOCKET, arena_path

MIB = 1 << 20
T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout_s: float = 10.0, what: str = "") -> T:
    """The predicate's first true value. Polls: what is waited for happens in other processes."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or predicate}")
        time.sleep(0.005)


def span(pages: int, conversation: int = 0) -> list[str]:
    """Page keys of a conversation: 4 tokens a page."""
    return [key.hex() for key in chain([conversation, *range(4 * pages - 1)], 4)]


class PluginProcess:
    """A worker with the real plugin in a process of its own, see tests.plugin_process."""

    def __init__(self, socket: Path, *args: object) -> None:
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.plugin_process", str(socket), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            text=True,
        )
        self.seconds = 0.0  # the last order took

    def tell(self, do: str, **order: object) -> None:
        """Give an order without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker process died"
        reply = json.loads(line)
        self.seconds = reply["seconds"]
        return reply["answer"]

    def do(self, do: str, **order: object) -> Any:
        self.tell(do, **order)
        return self.hear()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Let it end by itself; nothing to say when it is dead already."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def __enter__(self) -> "PluginProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def reattached(worker: PluginProcess) -> None:
    """Wait until the plugin has found kvd again by itself."""
    eventually(lambda: worker.do("circuit") == "closed", 10, "the plugin is attached again")


ARENAS: set[str] = set()  # of all daemons that tests made: another kvd on this machine is none of our business


class Daemon:
    """A real `kvd` process on `folder`. `stop` checks that nothing is left behind."""

    def __init__(self, folder: Path, arena_mib: int = 64, extent_mib: int = 4, **settings: object) -> None:
        self.folder = folder
        self.socket = folder / SOCKET
        self.arena_path = arena_path(folder, os.getuid())
        ARENAS.add(self.arena_path.name)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("KVD_")},
            "KVD_RUN_DIR": str(folder),
            "KVD_ARENA__SIZE_BYTES": str(arena_mib * MIB),
            "KVD_ARENA__EXTENT_BYTES": str(extent_mib * MIB),
            **{f"KVD_{key.upper()}": str(value) for key, value in settings.items()},
        }
        self.log = folder / "kvd.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> "Daemon":
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvd.main"], env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"kvd ended: {self.log.read_text()}"
            try:
                self.tool().close()
            except Unavailable:
                return False
            return True

        eventually(ready, 20, "kvd is ready")

    def tool(self) -> Link:
        """An operator's connection."""
        return Link(self.socket, "tool", "test", None, 5.0)

    def status(self) -> wire.Status:
        link = self.tool()
        try:
            return link.ask(wire.GetStatus(), wire.Status, 5.0)
        finally:
            link.close()

    def faults(self) -> list[str]:
        """What the daemon finds wrong with itself."""
        link = self.tool()
        try:
            return bookkeeping(link)
        finally:
            link.close()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self) -> None:
        """A clean stop; nothing may be left."""
        if self.process is None:
            return
        process, self.process = self.process, None
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"kvd did not stop: {self.log.read_text()}") from None
        finally:
            killed = process.returncode == -signal.SIGKILL
            leftovers = [str(p) for p in (self.arena_path, self.socket, self.folder / DATA_SOCKET) if p.exists()]
            self.arena_path.unlink(missing_ok=True)
        assert "Traceback" not in self.log.read_text(), self.log.read_text()
        if not killed:
            assert process.returncode == 0, f"kvd ended with {process.returncode}: {self.log.read_text()}"
            assert not leftovers, f"kvd left {leftovers}"

    def __enter__(self) -> "Daemon":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()
