"""A real SGLang worker's events through kvd to a router: what it holds itself, and what kvd keeps of it."""

import json
import tempfile
from pathlib import Path

import pytest

from kvd import sglang_info, wire
from kvd.pages import chain
from kvd.sglang_events import CPU_PINNED, GPU
from tests.event_stream import Router, free_ports
from tests.harness import Daemon
from tests.sglang_node import ARENA_MIB, PAGE_TOKENS, TREE, ask, closing_server, needs_sglang, pages_held, worker

pytestmark = [needs_sglang, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = TREE[1:6]


def blocks(prompt: tuple[int, ...]) -> set[int]:
    return {int.from_bytes(key[:8], signed=True) for key in chain(prompt, PAGE_TOKENS)}


def test_a_router_knows_exactly_what_a_real_worker_and_kvd_hold() -> None:
    ports = free_ports(2)
    config = {
        "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{ports}", "replay_endpoint": f"tcp://127.0.0.1:{ports + 1}",
        "bind": True, "topic": "kv-events",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="kvd-test-") as folder:
        run, endpoint = Path(folder) / "run", f"ipc://{folder}/events"
        server = worker("events", run / "kvd.sock", args=["--kv-events-config", json.dumps(config)])
        url = f"http://127.0.0.1:{server.port}"
        events = {"events__endpoint": endpoint, "events__workers": json.dumps([url])}
        with (
            Daemon(run, ARENA_MIB, 16, **events) as kvd,
            closing_server(server),
            Router(endpoint) as router,
        ):
            server.start()
            server.wait_ready()
            router.until(lambda: not router.why and not router.source_why(url), 60)
            for prompt in PROMPTS:
                ask(server, prompt)
            asked = set().union(*(blocks(prompt) for prompt in PROMPTS))
            router.until(lambda: asked <= set(router.held(url, medium=GPU)), 60)
            router.until(lambda: asked <= set(router.held(url, medium=CPU_PINNED)), 60)
            router.until(lambda: asked <= set(router.held(medium=wire.RAM)), 60)
            assert len(router.held(medium=wire.RAM)) == pages_held(kvd)
            assert router.view.sources[url, 0, ""].source.block_tokens == PAGE_TOKENS
            assert not router.view.sources[url, 0, ""].source.strange
            told = json.loads(server.request("GET", "/server_info"))
            assert router.view.sources[url, 0, ""].source.life == sglang_info.life(told) != ""
            kept = [known.source for known in router.view.sources.values() if known.source.pool == "kv"]
            assert {source.workers for source in kept if source.block_tokens} == {(url,)}, "it is attached"
            server.flush_cache()
            router.until(lambda: not router.held(url, medium=GPU) and not router.held(url, medium=CPU_PINNED), 60)
            assert (router.why, router.source_why(url)) == ("", "")
            assert asked <= set(router.held(medium=wire.RAM)), "kvd keeps what the worker has dropped"
