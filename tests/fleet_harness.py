"""A real fleet between mock workers and real nodes, on an event loop that runs while something is awaited."""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kvd.router.fleet.fleet import Fleet, Options
from kvd.router.fleet.members import MemberView
from kvd.router.fleet.nodes import NodeAt
from kvd.router.leastbusy import LeastBusy
from kvd.router.load import Load, Report
from kvd.router.pages.told import Told
from kvd.router.proxy.client import Client
from kvd.router.proxy.house import House, Limits
from kvd.router.steering import Choice, Incoming, Worker, worker_at
from kvd.router.tenants import Tenants
from tests.event_stream import ScriptedWorker, free_ports
from tests.harness import Daemon
from tests.router_harness import MockWorker

T = TypeVar("T")
BLOCK = 4  # tokens, of the scripted publishers


class Recorded:
    """Where connections would be."""

    def __init__(self) -> None:
        self.open: set[str] = set()

    def join(self, worker: Worker) -> None:
        self.open.add(worker.name)

    def leave(self, name: str) -> None:
        self.open.remove(name)


class World:
    """A fleet with its steering. Everything that takes time is a call of `until`."""

    def __init__(self, *urls: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, what: self.failures.append(what))
        self.failures: list[Any] = []
        self.reports: dict[str, Report] = {}
        self._loop.run_until_complete(self._open([worker_at(url) for url in urls], Options(**options)))

    async def _open(self, workers: list[Worker], options: Options) -> None:
        self.fleet = Fleet(workers, options)
        self.steering, self.doors = LeastBusy(workers, 8, 8), Recorded()
        self.doors.open |= {worker.name for worker in workers}
        self.fleet.attach(self.steering, self.doors, self.reports.__setitem__)
        self._job = self._loop.create_task(self.fleet.run())

    def until(self, predicate: Callable[[], Any], timeout_s: float = 15.0) -> Any:
        """The predicate's first true value; the fleet goes on meanwhile."""
        return self._loop.run_until_complete(self._until(predicate, time.monotonic() + timeout_s))

    async def _until(self, predicate: Callable[[], Any], deadline: float) -> Any:
        while not (value := predicate()):
            assert time.monotonic() < deadline, f"not in time; {self.fleet.members()}"
            assert not self._job.done(), "the fleet ended"
            await asyncio.sleep(0.01)
        return value

    def settle(self) -> None:
        """Until steering has heard all that is known."""
        self.until(lambda: not self.fleet._due)

    def run(self, task: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(task)

    def start(self, task: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        return self._loop.create_task(task)

    def order(self, order: Callable[..., Any], *arguments: Any) -> Any:
        """Call something of the fleet's on its event loop."""

        async def call() -> Any:
            return order(*arguments)

        return self._loop.run_until_complete(call())

    def view(self, name: str) -> MemberView:
        return next(view for view in self.fleet.members() if view.name == name)

    def chosen(self) -> Choice:
        """Of a request that comes now."""
        now = self._loop.time()
        request = Incoming("r", "POST", "/generate", [], b"{}", "", 1.0, 0, now, now + 5, True)
        return self._loop.run_until_complete(self.steering.choose(request, frozenset()))

    def has(self, blocks: list[int], tokens: int = 1000, stored: Sequence[int] = ()) -> dict[str, tuple[int, ...]]:
        """Matched tokens of workers that are credited, GPU first, for a prompt whose blocks have these hashes.

        `stored`: and its pages in kvd's tiers these, where they are others.
        """
        manners = {self.fleet.manner(view.name) for view in self.fleet.members()} - {None}
        chains = {manner: blocks for manner in manners if manner is not None}
        found = self.fleet.matched(chains, tokens, dict.fromkeys(chains, stored) if stored else {})
        return {name: tuple(matched) for name, matched in found.items()}

    def close(self) -> None:
        if not self._loop.is_closed():
            self._job.cancel()
            self._loop.run_until_complete(asyncio.gather(self._job, return_exceptions=True))
            self.fleet.close()
            self.fleet.close()
            self._loop.run_until_complete(asyncio.sleep(0.01))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
            assert not self.failures, self.failures

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Proxied(World):
    """With the router's own proxy in front, on a real port."""

    async def _open(self, workers: list[Worker], options: Options) -> None:
        self.fleet = Fleet(workers, options)
        self.steering = LeastBusy(workers, 8, 8)
        told = Told(self.fleet, lambda name: Load(running=self.steering.running(name)), "least_busy")
        named = {worker.name: worker for worker in workers}
        self.house = House(named, self.steering, Tenants([], b""), Limits(), told)
        self.fleet.attach(self.steering, self.house)
        self._job = self._loop.create_task(self.fleet.run())
        self._server = await self._loop.create_server(lambda: Client(self.house), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        if not self._loop.is_closed():
            self._server.close()
            self.run(self.house.drain(1.0))
        super().close()

    async def ask(self, method: str, path: str, body: object = None, *headers: str) -> str:
        """The whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps(body).encode() if body is not None else b""
        lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close", f"content-length: {len(data)}", *headers]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        answer = await reader.read()
        writer.close()
        return answer.decode()


class Publishing:
    """A mock worker that publishes KV events: scripted ones."""

    def __init__(self, model: Path, block: int = BLOCK, steps: int = 1000) -> None:
        """`steps`: how many batches it can repeat."""
        self.events = ScriptedWorker(steps=steps)
        self.mock = MockWorker(model=str(model), info=describes(model, self.events, block))
        self.url = self.mock.url

    def stop(self) -> None:
        self.mock.__exit__()
        self.events.stop()

    def __enter__(self) -> "Publishing":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def describes(model: Path, events: ScriptedWorker | None = None, block: int = BLOCK, **more: Any) -> dict[str, Any]:
    """The /server_info of a worker with this model."""
    info: dict[str, Any] = {"model_path": str(model), "served_model_name": "the-model", "page_size": block}
    info |= {"chunked_prefill_size": 512, "max_total_num_tokens": 40_000, "kv_events": None}
    if events is not None:
        base = int(events.url.rpartition(":")[2])
        info["kv_events"] = {
            "publisher": "zmq", "endpoint_host": "127.0.0.1", "endpoint_port_base": base + 1, "topic": "kv-events",
            "block_size": block, "dp_size": 1, "replay_endpoint_port_base": base + 2,
        }  # fmt: skip
    return info | more


@contextmanager
def node(*urls: str, **settings: object) -> Iterator[tuple[Daemon, NodeAt]]:
    """A kvd that follows the workers at these URLs, and where it publishes."""
    with tempfile.TemporaryDirectory(prefix="kvd-") as folder, ExitStack() as stack:
        endpoint = f"ipc://{folder}/events"
        settings = {"events__endpoint": endpoint, "events__workers": json.dumps(urls), **settings}
        yield stack.enter_context(Daemon(Path(folder) / "run", **settings)), NodeAt(endpoint, f"{endpoint}.replay")


def free_port() -> int:
    return free_ports(1)
