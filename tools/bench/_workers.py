"""Worker processes for the lookup benchmark: each has a plugin of its own, and the bare echoes to compare with.

Forked from a parent that has imported torch but has no threads yet, so that eight of them start at once. A worker is
told what to time (`Task`) over a pipe and answers with the times, in microseconds.
"""

import multiprocessing
import os
import random
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import zmq

from kvd.sidecar.hicache import KvdStorage
from tests.harness import Daemon
from tools.bench._kvd import attach, fresh_keys, mha_pool, slots

FRAME = bytes(48)
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Task:
    """Do `what` `count` times: back to back, or at `rate` a second."""

    what: str  # "hit" "half" "miss" "zmq" "unix"
    keys: int = 0
    count: int = 0
    rate: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.keys} {self.what}" if self.keys else f"bare {self.what} trip"


@dataclass(frozen=True, slots=True)
class Held:
    """What kvd holds: `chains` of 512 pages, and one `long` chain."""

    chains: list[list[str]]
    long: list[str]


class Process:
    """A forked process with a pipe. `stop` is idempotent."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        self.pipe, other = _fork.Pipe()
        self._process = _fork.Process(target=_child, args=(target, self.pipe, other, *arguments), daemon=True)
        self._process.start()
        other.close()

    def tell(self, message: object) -> None:
        self.pipe.send(message)

    def hear(self, timeout_s: float = 120.0) -> Any:
        if not self.pipe.poll(timeout_s):
            raise TimeoutError("a worker process does not answer")
        return self.pipe.recv()

    def stop(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()
        self.pipe.close()


def _child(target: Callable[..., None], parents: Connection, pipe: Connection, *arguments: object) -> None:
    parents.close()
    target(pipe, *arguments)


def worker(pipe: Connection, daemon: Daemon, folder: Path, held: Held) -> None:
    """Attach on the first message (the daemon is up by then), then do tasks until told None."""
    pipe.recv()
    plugin = attach(daemon, small_pool(), warm=False)
    calls = _Calls(plugin, folder, held)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        pipe.send(_time(calls.make(task), task))
    plugin.close()


def mover(pipe: Connection, daemon: Daemon, held: Held, pages: int, rate: float) -> None:
    """Set and get batches of 1 MiB pages, `rate` pairs a second, between "go" and "halt".

    The arena is soon full, so each set evicts. The deepest page of every chain in `held` is read too, again and
    again: else the daemon would rightly give up the small pages first, which only lookups ask for.
    """
    pipe.recv()
    large, small = mha_pool(tokens=64, layers=32, heads=1, pages=pages), small_pool()
    storing, keeping = attach(daemon, large), attach(daemon, small, warm=False)
    indices, one = slots(large, range(pages)), slots(small, [0])
    pipe.send("ready")
    while pipe.recv() == "go":
        done = 0
        while not pipe.poll(1 / rate):
            keys = fresh_keys(pages)
            assert all(storing.batch_set_v1(keys, indices)), storing.stats()
            assert all(storing.batch_get_v1(keys, indices)), storing.stats()
            assert all(keeping.batch_get_v1([chain[-1]], one) == [True] for chain in (*held.chains, held.long))
            done += 1
        pipe.recv()  # "halt"
        pipe.send(done)


def small_pool() -> Any:
    """Pages of 4 KiB, so that 16384 of them fit."""
    return mha_pool(tokens=1, layers=8, heads=1, pages=128)


class _Calls:
    def __init__(self, plugin: KvdStorage, folder: Path, held: Held) -> None:
        self._plugin = plugin
        self._held = held
        self._unix = socket.socket(socket.AF_UNIX)
        self._unix.connect(str(folder / "echo.unix"))
        self._zmq = zmq.Context().socket(zmq.DEALER)
        self._zmq.connect(f"ipc://{folder / 'echo.zmq'}")
        self._next = os.getpid() % 16

    def make(self, task: Task) -> Callable[[], object]:
        if task.what == "unix":
            return self._unix_trip
        if task.what == "zmq":
            return self._zmq_trip
        half = task.keys // 2
        if task.what == "miss":
            asked, found = [fresh_keys(task.keys) for _ in range(4)], 0
        else:
            chains = self._held.chains if task.keys <= 512 else [self._held.long]
            asked, found = [chain[: task.keys] for chain in chains], task.keys
            if task.what == "half":
                asked, found = [chain[:half] + fresh_keys(task.keys - half) for chain in asked], half
        return lambda: self._lookup(asked, found)

    def _lookup(self, asked: list[list[str]], found: int) -> None:
        """Each call asks about another chain than the one before."""
        self._next += 1
        pages = self._plugin.batch_exists(asked[self._next % len(asked)])
        assert pages == found, f"{pages} pages found, not {found}: {self._plugin.stats()}"

    def _unix_trip(self) -> None:
        self._unix.send(FRAME)
        assert len(self._unix.recv(256)) == len(FRAME)

    def _zmq_trip(self) -> None:
        self._zmq.send(FRAME)
        self._zmq.recv()


def _time(call: Callable[[], object], task: Task) -> list[float]:
    clock, times = time.perf_counter, []
    due = clock() + random.random() / task.rate if task.rate else 0.0
    for _ in range(task.count):
        if task.rate:
            time.sleep(max(0.0, due - clock()))
            due += 1 / task.rate
        started = clock()
        call()
        times.append(1e6 * (clock() - started))
    return times


def unix_echo(pipe: Connection, folder: Path) -> None:
    """Sends back what it receives, on any number of stream connections."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "echo.unix"))
    listener.listen(64)
    pipe.send("ready")
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            peer = key.fileobj
            assert isinstance(peer, socket.socket)
            if peer is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
            elif data := peer.recv(256):
                peer.send(data)
            else:
                selector.unregister(peer)
                peer.close()


def zmq_echo(pipe: Connection, folder: Path) -> None:
    """The same on a ROUTER."""
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(f"ipc://{folder / 'echo.zmq'}")
    pipe.send("ready")
    while True:
        router.send_multipart(router.recv_multipart())
