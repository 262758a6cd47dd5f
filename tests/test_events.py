"""A node's stream of prefix events: a real kvd between scripted workers with SGLang's frames and a router's view."""

import asyncio
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from kvd import wire
from kvd.daemon.discovery import Address
from kvd.daemon.publisher import Publisher
from tests.event_stream import Router, ScriptedWorker
from tests.harness import Daemon, PluginProcess, span
from tests.kvdctl import RawWorker


@contextmanager
def node(*workers: ScriptedWorker, **settings: object) -> Iterator[tuple[Daemon, str]]:
    """A kvd that follows these workers, and where it publishes."""
    with tempfile.TemporaryDirectory(prefix="kvd-") as folder:  # short: sockets have short names
        endpoint = f"ipc://{folder}/events"
        urls = json.dumps([worker.url for worker in workers])
        with Daemon(Path(folder) / "run", events__endpoint=endpoint, events__workers=urls, **settings) as kvd:
            yield kvd, endpoint


def hashes(keys: list[str]) -> list[int]:
    return [int.from_bytes(bytes.fromhex(key)[:8], signed=True) for key in keys]


@pytest.mark.parametrize("shape", ["map", "array"])
def test_what_workers_hold_reaches_a_router_rank_by_rank(shape: str) -> None:
    with ScriptedWorker(ranks=2, shape=shape) as worker:
        worker.do("store", 1, 2, 3)
        worker.do("store", 9, rank=1, medium="CPU_PINNED")
        with node(worker) as (kvd, endpoint), Router(endpoint) as router:
            router.until(lambda: not router.why and router.held(worker.url) == {1: None, 2: 1, 3: 2})
            router.until(lambda: router.held(worker.url, 1, "CPU_PINNED") == {9: None})
            router.until(lambda: not router.source_why(worker.url) and not router.source_why(worker.url, 1))
            router.until(lambda: kvd.status().counters.get("event_publishers_exact") == 2)
            worker.do("remove", 3, 2)
            worker.do("store", 5, parent=1)
            router.until(lambda: router.held(worker.url) == {1: None, 5: 1})
            assert router.view.sources[worker.url, 0, ""].source.block_tokens == 4
            worker.do("clear")
            router.until(lambda: router.held(worker.url) == {})


def test_a_workers_lost_events_and_its_restart_heal_by_themselves() -> None:
    with ScriptedWorker() as worker, node(worker) as (_, endpoint), Router(endpoint) as router:
        worker.do("store", 1)
        router.until(lambda: router.held(worker.url) == {1: None} and not router.source_why(worker.url))
        worker.do("remove", 1, lose=True)
        worker.do("store", 2)
        router.until(lambda: router.held(worker.url) == {2: None} and not router.source_why(worker.url))
        worker.stop()
        router.until(lambda: "connection" in router.source_why(worker.url))
        worker.start()
        for n in range(3):
            worker.do("store", 100 + n)
        router.until(lambda: set(router.held(worker.url)) == {100, 101, 102} and not router.source_why(worker.url))
        assert router.why == ""


def test_a_worker_that_names_blocks_otherwise_is_told_of_as_a_stranger() -> None:
    """Ours does: its hashes are its orders', not its tokens'."""
    with ScriptedWorker() as worker, node(worker) as (kvd, endpoint), Router(endpoint) as router:
        worker.do("store", 1)
        router.until(lambda: router.held(worker.url) == {1: None})
        assert not router.view.sources[worker.url, 0, ""].source.strange
        for n in range(2, 10):
            worker.do("store", n)
        router.until(lambda: router.view.sources[worker.url, 0, ""].source.strange)
        router.until(lambda: kvd.status().counters.get("event_publishers_strange") == 1)
        assert not router.source_why(worker.url), "what it holds is known all the same"


def test_a_worker_without_replay_is_not_exact_until_it_clears() -> None:
    with ScriptedWorker(replay=False) as worker:
        worker.do("store", 1)
        with node(worker) as (_, endpoint), Router(endpoint) as router:
            router.until(lambda: "before kvd listened" in router.source_why(worker.url))
            router.until(lambda: worker.do("clear") or not router.source_why(worker.url))
            worker.do("store", 2)
            router.until(lambda: router.held(worker.url) == {2: None})


@contextmanager
def publisher(worker: ScriptedWorker, replay: bool = True) -> Iterator[Callable[..., None]]:
    """kvd's connection to a worker, without a kvd: what lets it go on until something holds, on a clock that may be
    ahead of the real one."""
    loop, context = asyncio.new_event_loop(), zmq.Context()
    base = int(worker.url.rpartition(":")[2])
    at = Address(0, f"tcp://127.0.0.1:{base + 1}", f"tcp://127.0.0.1:{base + 2}" if replay else None, "kv-events", 4)
    ahead_s = 0.0

    async def opened() -> Publisher:
        return Publisher(context, worker.url, at, 1000, lambda *_: None)

    async def go_on(holds: Callable[[Publisher], bool], step_s: float) -> None:
        nonlocal ahead_s
        for _ in range(1000):
            if holds(found):
                return
            ahead_s += step_s
            found.tick(time.monotonic() + ahead_s)
            await asyncio.sleep(0.01)
        raise AssertionError(found.why)

    found = loop.run_until_complete(opened())
    try:
        yield lambda holds, step_s=0.0: loop.run_until_complete(go_on(holds, step_s))
    finally:
        found.close()
        context.term()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_a_worker_that_hangs_is_not_exact_until_it_answers() -> None:
    with ScriptedWorker() as worker, publisher(worker) as until:
        worker.do("store", 1, 2)
        until(lambda one: not one.why and one.held == {"GPU": {1: None, 2: 1}})
        assert worker._process is not None
        worker._process.send_signal(signal.SIGSTOP)
        until(lambda one: "does not answer" in one.why, 0.5)
        worker._process.send_signal(signal.SIGCONT)
        worker.do("store", 3)
        until(lambda one: not one.why and 3 in one.held["GPU"])


def test_a_worker_that_cannot_repeat_anything_is_not_doubted_for_being_idle() -> None:
    with ScriptedWorker(replay=False) as worker, publisher(worker, replay=False) as until:
        until(lambda one: worker.do("clear") or not one.why)
        ticks = iter(range(100))
        until(lambda one: bool(one.why) or next(ticks) == 99, 1.0)
        until(lambda one: not one.why)


def test_pages_in_ram_reach_a_router_and_heal_after_kill_9_of_kvd() -> None:
    keys = span(40)
    blocks = hashes(keys)
    with node() as (kvd, endpoint), Router(endpoint) as router, PluginProcess(kvd.socket) as worker:
        router.until(lambda: not router.why)
        assert worker.do("wait")
        worker.do("put", keys=keys)
        router.until(lambda: router.held(medium=wire.RAM) == dict(zip(blocks, [None, *blocks], strict=False)))
        (known,) = router.view.sources.values()
        assert (known.source.pool, known.source.block_tokens, known.why) == ("kv", 4, "")
        epoch = router.view.epoch
        kvd.kill()
        router.until(lambda: router.why)
        kvd.start()
        router.until(lambda: not router.why and router.view.epoch != epoch)
        router.until(lambda: set(router.held(medium=wire.RAM)) == set(blocks))


def test_a_router_that_had_no_time_to_read_does_not_ask_anew() -> None:
    with node() as (kvd, endpoint), Router(endpoint) as router, RawWorker(kvd) as worker:
        worker.put(6)
        router.until(lambda: router.view.snapshots == 1)
        for seconds in (5, 10, 15):  # it comes to its ticks, late, and to nothing else
            router._follow.tick(time.monotonic() + seconds)
        router.until(lambda: not router.why and len(router.held(medium=wire.RAM)) == 6)
        assert (router.view.snapshots, router.view.replays) == (1, 0)


@pytest.mark.slow
def test_what_leaves_ram_is_told_and_what_lies_below_it_too(tmp_path: Path) -> None:
    keys = span(200)  # of 16 KiB: more than fits
    settings: dict[str, object] = {"nvme__path": tmp_path / "nvme", "nvme__size_bytes": 64 << 20}
    settings |= {"nvme__segment_bytes": 1 << 20, "nvme__write_delay_s": 0.05}
    settings |= {"arena__size_bytes": 2 << 20, "arena__extent_bytes": 1 << 20}
    with node(**settings) as (kvd, endpoint), Router(endpoint) as router, PluginProcess(kvd.socket) as worker:

        def agrees() -> bool:
            ram, nvme = (tier.pages for tier in kvd.status().tiers)
            return (len(router.held(medium=wire.RAM)), len(router.held(medium=wire.NVME))) == (ram, nvme) and nvme > 0

        assert worker.do("wait")
        for at in range(0, 200, 20):
            worker.do("put", keys=keys[at : at + 20])
        router.until(agrees)
        assert 0 < len(router.held(medium=wire.RAM)) < 200
        kvd.kill()
        kvd.start()
        router.until(lambda: not router.why and agrees())
        assert set(router.held(medium=wire.NVME)) <= set(hashes(keys))


def test_a_stranger_reads_the_stream_as_sglangs_own() -> None:
    """SGLang's client: three frames, a replay from 0, structs that know no kvd."""

    class BlockStored(msgspec.Struct, tag=True):
        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None = None

    class BlockRemoved(msgspec.Struct, tag=True):
        block_hashes: list[int]
        medium: str | None = None

    class AllBlocksCleared(msgspec.Struct, tag=True):
        pass

    class EventBatch(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
        ts: float
        events: list[BlockStored | BlockRemoved | AllBlocksCleared]
        attn_dp_rank: int | None = None

    with ScriptedWorker() as worker, node(worker) as (_, endpoint), Router(endpoint) as router:
        worker.do("store", 1, 2)
        worker.do("remove", 2)
        router.until(lambda: router.held(worker.url) == {1: None})
        with zmq.Context() as context, context.socket(zmq.DEALER) as client:
            client.linger = 0
            client.connect(f"{endpoint}.replay")
            client.send_multipart((b"", bytes(8)))
            seqs, found = [], []
            while True:
                assert client.poll(10_000)
                delimiter, topic, seq, payload = client.recv_multipart()
                assert delimiter == b""
                if seq == b"\xff" * 8:
                    break
                assert topic.startswith(wire.TOPIC)
                batch = msgspec.msgpack.decode(payload, type=EventBatch)
                seqs.append(int.from_bytes(seq))
                found += [event for event in batch.events if getattr(event, "block_hashes", None)]
    assert seqs == list(range(len(seqs)))
    assert found == [BlockStored([1, 2], None, [7] * 8, 4, None, "GPU"), BlockRemoved([2], "GPU")]


def test_noise_at_the_request_socket_harms_nobody() -> None:
    noises = [[b""], [b"x", b"y"], [b"", b"x" * 100], [b"", b"", b"", b""], [b"", b"\xff" * 8], [b"", b"\x80"]]
    with node() as (_, endpoint), Router(endpoint) as router:
        with zmq.Context() as context, context.socket(zmq.DEALER) as client:
            client.linger = 1000
            client.connect(f"{endpoint}.replay")
            for noise in 20 * noises:
                client.send_multipart(noise)
        router.until(lambda: not router.why)
