"""Nodes of a shared tier in a bucket, killed: processes of the tier alone, and whole daemons."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvd import wire
from tests.failpoint_names import failpoint_names
from tests.harness import MIB, Daemon, PluginProcess, eventually, reattached, span
from tests.s3_server import SERVERS, Place, Server, s3_server
from tests.shared_lives import NodeProcess, check, killed_at_random


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(request.param, tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> Place:
    return server.make_bucket(request.node.name)


def files(bucket: Place) -> Iterator[bytes]:
    return (bucket.read(key) for key in bucket.objects() if key.endswith(".pages.arrow"))


@pytest.mark.parametrize("nodes", [2, 4])
def test_nodes_killed_at_any_time_lose_nothing_acknowledged(bucket: Place, nodes: int) -> None:
    check(bucket.uri, killed_at_random(bucket.uri, nodes, 6, nodes), files(bucket))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("nodes", [2, 4])
def test_nodes_killed_for_a_long_time_lose_nothing_acknowledged(bucket: Place, nodes: int) -> None:
    check(bucket.uri, killed_at_random(bucket.uri, nodes, 60, 10 + nodes), files(bucket))


@pytest.mark.parametrize("step", failpoint_names("shared", "bucket."))
def test_a_node_killed_at_a_step_leaves_whole_objects_only(bucket: Place, step: str) -> None:
    """The ninth object is a merge's."""
    life = NodeProcess(bucket.uri, "a", 1, turns=60, failpoint=f"{step}:9:kill")
    assert life.end() == -signal.SIGKILL, "the step was reached"
    again = NodeProcess(bucket.uri, "a", 2, turns=3)
    assert again.end() == 0
    check(bucket.uri, [life, again], files(bucket))


def shared(daemon: Daemon) -> wire.TierStatus:
    return daemon.status().tiers[1]


def works(daemon: Daemon) -> None:
    eventually(lambda: not shared(daemon).trouble, 30, "the shared tier works")


def read(worker: PluginProcess, conversation: int) -> set[str]:
    worker.do("exists", keys=span(100, conversation))
    return set(worker.do("take", keys=span(100, conversation)))


@pytest.mark.slow
def test_of_two_daemons_one_is_killed_while_it_stores(bucket: Place, tmp_path: Path) -> None:
    """What kvd said was in the bucket is there for the other, whatever of it was killed."""
    rng = random.Random(3)
    settings = {"shared__uri": bucket.uri, "shared__poll_s": 0.2, "shared__write_delay_s": 0.0}
    settings["shared__quota_bytes"] = 512 * MIB
    with (
        Daemon(tmp_path / "first", 16, 4, **settings, shared__node="first") as first,
        Daemon(tmp_path / "second", 16, 4, **settings, shared__node="second") as second,
        PluginProcess(first.socket) as here,
        PluginProcess(second.socket) as there,
    ):
        works(second)
        assert there.do("wait")
        for round_ in range(2):
            works(first)
            assert here.do("wait")
            reattached(here)
            here.do("put", keys=span(100, round_))
            eventually(lambda: first.status().counters.get("pages_written_back", 0) >= 100, 30, "acknowledged")
            here.do("put", keys=span(100, 10 + round_))
            time.sleep(rng.random() * 0.3)  # at any time
            if round_ % 2:
                (tier,) = psutil.Process(first.status().pid).children()
                tier.kill()
                eventually(lambda: shared(first).counters["restarts"] == 1, 10)
            first.kill()
            first.arena_path.unlink()
            first.start()
            eventually(lambda n=round_: read(there, n) == {"right"}, 30, "what was acknowledged")
            assert read(there, 10 + round_) <= {"right", "miss"}
        assert first.faults() == second.faults() == []


@pytest.mark.slow
def test_a_server_that_hangs_costs_a_deadline(bucket: Place, tmp_path: Path) -> None:
    settings = {"shared__uri": bucket.uri, "shared__node": "n", "shared__write_delay_s": 0.0}
    with Daemon(tmp_path / "run", 16, 4, **settings) as daemon, PluginProcess(daemon.socket) as worker:
        works(daemon)
        assert worker.do("wait")
        worker.do("put", keys=span(100))
        eventually(lambda: shared(daemon).pages == 100, 30, "all is stored")
        daemon.kill()
        daemon.arena_path.unlink()
        daemon.start()
        works(daemon)
        reattached(worker)
        os.kill(bucket.server.pid, signal.SIGSTOP)
        try:
            assert worker.do("exists", keys=span(100)) == 100, "it is not known yet"
            assert worker.seconds < 0.25
            assert worker.do("take", keys=span(100)) == ["miss"] * 100
            assert worker.seconds < 1.8
            worker.do("put", keys=span(100, 1))
            assert read(worker, 1) == {"right"}, "RAM does not care"
            assert worker.do("circuit") == "closed"
        finally:
            os.kill(bucket.server.pid, signal.SIGCONT)
        eventually(lambda: read(worker, 0) == {"right"}, 30, "it brings them again")
        eventually(lambda: shared(daemon).pages == 200, 30, "and takes what is new")
        assert daemon.faults() == []
