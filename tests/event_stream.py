"""What tests of the node's stream share: a scripted worker, and a router's view that follows a real kvd."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zmq

from kvd.router.follow import Follow
from kvd.router.numbering import Numbering
from kvd.router.view import View
from tests.index_model import SetIndex


def free_ports(count: int) -> int:
    """The first of so many free ports in a row: below those that SGLang draws for itself, 22,000 to 29,999."""
    for base in range(10_000 + time.time_ns() % 5_000, 16_000, count):
        with ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return base
    raise AssertionError("no free ports")


class ScriptedWorker:
    """tests.scripted_publisher in a process of its own, on ports that it keeps when it starts again."""

    def __init__(self, ranks: int = 1, replay: bool = True, steps: int = 1000, shape: str = "map") -> None:
        base = free_ports(2 * ranks + 1)
        ports = (base, base + 1, base + 1 + ranks if replay else 0)
        self.url = f"http://127.0.0.1:{base}"
        self._arguments = [*map(str, ports), str(ranks), str(steps), shape]
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.scripted_publisher", *self._arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True,
        )  # fmt: skip
        self._hear("ready")

    def do(self, do: str, *hashes: int, **more: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "hashes": hashes, **more}) + "\n")
        self._process.stdin.flush()
        self._hear("done")

    def stop(self) -> None:
        """kill -9; what it held is gone with it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def _hear(self, word: str) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{word}\n", "the scripted worker died"

    def __enter__(self) -> "ScriptedWorker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


class Router:
    """A view of one node, by default with the simplest index. It hears only while `until` runs."""

    def __init__(self, endpoint: str, index: Any = None) -> None:
        self.index, self.holders = index if index is not None else SetIndex(), Numbering()
        self.view = View(self.index, self.holders)
        self._loop = asyncio.new_event_loop()
        self._context = zmq.Context()
        self._follow = self._loop.run_until_complete(self._open(endpoint))

    async def _open(self, endpoint: str) -> Follow:
        return Follow(self._context, endpoint, f"{endpoint}.replay", self.view)

    @property
    def why(self) -> str:
        return self.view.why(time.monotonic())

    def held(self, worker: str = "", rank: int = 0, medium: str = "GPU") -> dict[int, int | None]:
        """Hashes and their parents, of all namespaces together."""
        found: dict[int, int | None] = {}
        for number, blocks in self.index.held.items():
            place = self.holders.place(number)
            assert place is not None
            if (place.worker, place.rank, place.medium) == (worker, rank, medium):
                found |= blocks
        return found

    def source_why(self, worker: str, rank: int = 0) -> str:
        known = self.view.sources.get((worker, rank, ""))
        return known.why if known is not None else "not known"

    def until(self, predicate: Callable[[], object], timeout_s: float = 20.0) -> None:
        """Follow the node until this holds."""
        self._loop.run_until_complete(self._until(predicate, time.monotonic() + timeout_s))

    async def _until(self, predicate: Callable[[], object], deadline: float) -> None:
        while not predicate():
            assert time.monotonic() < deadline, f"not in time; {self.why or self.view.sources}"
            self._follow.tick(time.monotonic())
            await asyncio.sleep(0.02)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._follow.close()
            self._context.term()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    def __enter__(self) -> "Router":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
