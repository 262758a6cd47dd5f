"""Real SGLang workers behind a real kvd and a real kvd-router: what tests and benches of routing start."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvd.places import SOCKET
from tests.event_stream import free_ports
from tests.harness import Daemon, eventually
from tests.router_harness import Router
from tests.sglang_node import ARENA_MIB, SERVED_AS, closing_server, plugin_ready, worker
from tools.demo.node import extra_config
from tools.sglang_cpu.endpoint import Endpoint
from tools.sglang_cpu.server import HiCache, SglangServer

KV_TOKENS = 4096  # a worker; four of them share a small machine


def publishing(port: int) -> list[str]:
    """A worker's arguments that let its KV events be followed, and its answers say how much was cached.

    It takes `port` and the next one.
    """
    config = {
        "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{port}", "replay_endpoint": f"tcp://127.0.0.1:{port + 1}",
        "bind": True, "topic": "kv-events",
    }  # fmt: skip
    return ["--kv-events-config", json.dumps(config), "--enable-cache-report"]


def url_of(server: SglangServer) -> str:
    return f"http://127.0.0.1:{server.port}"


@dataclass
class World:
    """Workers that are ready, and their node's kvd."""

    folder: Path
    endpoint: str
    kvd: Daemon
    servers: Sequence[SglangServer]
    router: Router = field(init=False)  # whoever wants one starts it

    @property
    def door(self) -> Endpoint:
        """The router, asked as if it were a worker."""
        return Endpoint(self.router.port, "", SERVED_AS)

    def start_router(self, port: int = 0, **settings: Any) -> Router:
        nodes = json.dumps([{"events": self.endpoint}])
        router = Router(self.folder, *map(url_of, self.servers), port=port, nodes=nodes, **settings)
        self.credited(router)
        return router

    def credited(self, router: Router, timeout_s: float = 120) -> None:
        """Until the router knows what every worker holds, and that its tokens are its own."""
        eventually(
            lambda: [worker["credit"] for worker in router.page("workers")["workers"]] == [True] * len(self.servers),
            timeout_s, "every worker has prefix credit",
        )  # fmt: skip

    def flush(self) -> None:
        """Empty the workers' own caches."""
        for server in self.servers:
            server.flush_cache()

    def attach(self) -> None:
        """Put kvd behind the workers' HiCache, where it is not from the start."""
        for server in self.servers:
            server.attach_storage("dynamic", HiCache(extra_config=extra_config(self.kvd.socket)).extra())
        plugin_ready(self.kvd, len(self.servers))

    def detach(self) -> None:
        for server in self.servers:
            server.detach_storage()

    def server_at(self, url: str) -> SglangServer:
        return next(server for server in self.servers if url_of(server) == url)


@contextmanager
def world(count: int, attached: bool = True) -> Iterator[World]:
    """`attached`: kvd is behind the workers' HiCache from the start."""
    with tempfile.TemporaryDirectory(prefix="kvd-test-") as name, ExitStack() as stack:
        folder = Path(name)
        run, endpoint = folder / "run", f"ipc://{folder}/events"
        port = free_ports(2 * count)
        socket = run / SOCKET if attached else None
        servers = [
            worker(f"router-{n}", socket, args=publishing(port + 2 * n), hicache=HiCache(), max_total_tokens=KV_TOKENS)
            for n in range(count)
        ]
        events = {"events__endpoint": endpoint, "events__workers": json.dumps([url_of(server) for server in servers])}
        kvd = stack.enter_context(Daemon(run, ARENA_MIB, 16, **events))
        for server in servers:
            stack.enter_context(closing_server(server))
            server.start()
        for server in servers:
            server.wait_ready()
        yield World(folder, endpoint, kvd, servers)
