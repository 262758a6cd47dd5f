"""What is known of workers through their nodes: real daemons, publishers and plugins, a fleet that follows them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import wire
from kvd.router.fleet import fleet, membership, nodes, watch
from kvd.router.fleet.nodes import NodeAt
from kvd.router.rates import LOAD
from kvd.router.tokens.blocks import Scheme
from kvd.router.tokens.blocks import hashes as named
from kvd.router.tokens.outcome import Namespace
from tests import router_models
from tests.fleet_harness import Publishing, World, describes, node
from tests.harness import PluginProcess, eventually, span
from tests.kvdctl import RawWorker
from tests.router_harness import MockWorker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = router_models.with_special(router_models.byte_level())
    return router_models.folder(tmp_path_factory.mktemp("model"), made)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as a test wants to know."""
    monkeypatch.setattr(watch, "LOADS_EVERY_S", 0.05)
    monkeypatch.setattr(watch, "HEALTH_EVERY_S", 0.05)
    monkeypatch.setattr(watch, "_BACKOFF_S", (0.05, 0.2))
    monkeypatch.setattr(membership, "GONE_AFTER_S", 2.0)


@pytest.fixture
def worker(model: Path) -> Iterator[Publishing]:
    with Publishing(model) as found:
        yield found


def changes(caplog: pytest.LogCaptureFixture, at: NodeAt) -> list[str]:
    """What the log says of this node, line by line."""
    said = [line for line in caplog.messages if line.startswith(f"node {at.events}: ")]
    return ["not" if "does not count" in line and "kvdctl doctor" in line else "exact" for line in said]


def test_blocks_count_while_the_nodes_stream_is_exact(
    worker: Publishing, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "kvd.router")
    monkeypatch.setattr(nodes, "SILENT_S", 0.2)
    worker.events.do("store", 11, 12, 13)
    with node(worker.url) as (kvd, at), World(worker.url, nodes=[at]) as world:
        world.until(lambda: world.has([11, 12, 99]) == {worker.url: (8, 0, 0, 0, 0)})
        assert world.view(worker.url).credit
        assert world.view(worker.url).node == at.events
        assert world.has([11, 12, 13], tokens=10) == {worker.url: (10, 0, 0, 0, 0)}, "no more than the prompt has"
        worker.events.do("store", 14, parent=13, medium="CPU_PINNED")
        worker.events.do("remove", 13)
        world.until(lambda: world.has([11, 12, 13]) == {worker.url: (8, 0, 0, 0, 0)})
        kvd.kill()
        world.until(lambda: world.has([11, 12]) == {})
        view = world.view(worker.url)
        assert (view.credit, view.state) == (False, "serving")
        assert "connection broke" in view.why
        assert at.events in view.remedy
        assert "kvdctl doctor" in view.remedy
        world.until(lambda: changes(caplog, at) == ["exact", "not"])
        assert world.fleet.describe()[f'node_exact{{node="{at.events}"}}'] == 0
        kvd.start()
        world.until(lambda: world.has([11, 12, 13]) == {worker.url: (8, 0, 0, 0, 0)})
        assert changes(caplog, at) == ["exact", "not", "exact"]


def test_credit_is_not_said_before_requests_get_it(worker: Publishing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_LOOK_S", 1e9)
    worker.events.do("store", 11)
    with node(worker.url) as (_, at), World(worker.url, nodes=[at]) as world:
        world.until(lambda: world.view(worker.url).credit)
        assert world.fleet.manner(worker.url) is not None
        world.fleet._manner_of.clear()  # as when the probe of its tokens has ended since the last look
        assert (world.view(worker.url).credit, world.view(worker.url).why) == (False, fleet._SOON)


def test_a_worker_that_makes_other_tokens_is_not_credited_with_blocks(worker: Publishing) -> None:
    worker.events.do("store", 11)
    worker.mock.set(other_tokens=True)
    with node(worker.url) as (_, at), World(worker.url, nodes=[at]) as world:
        world.until(lambda: world.view(worker.url).parity == "differs" and world.view(worker.url).node)
        assert world.has([11]) == {}
        assert "plain text" in world.view(worker.url).why


def test_the_same_worker_under_another_name_is_known_by_what_it_states(worker: Publishing) -> None:
    worker.events.do("store", 11)
    named = worker.url.replace("127.0.0.1", "localhost")
    with node(worker.url) as (_, at), World(named, nodes=[at]) as world:
        world.until(lambda: world.has([11]) == {named: (4, 0, 0, 0, 0)})
        world.settle()
        assert [view.name for view in world.fleet.members()] == [named], "its node's name for it is no other worker"


def test_a_server_under_two_names_is_credited_under_neither(worker: Publishing) -> None:
    worker.events.do("store", 11)
    named = worker.url.replace("127.0.0.1", "localhost")
    with node(worker.url) as (_, at), World(worker.url, named, nodes=[at]) as world:
        world.until(lambda: "two URLs" in world.view(named).remedy and "two URLs" in world.view(worker.url).remedy)
        assert world.has([11]) == {}


def test_a_second_name_that_drains_takes_no_credit_from_its_server(worker: Publishing) -> None:
    worker.events.do("store", 11)
    named = worker.url.replace("127.0.0.1", "localhost")
    with node(worker.url) as (_, at), World(worker.url, nodes=[at]) as world:
        world.until(lambda: world.has([11]) == {worker.url: (4, 0, 0, 0, 0)})
        world.order(world.fleet.add, named)
        world.until(lambda: world.view(named).state == "serving" and world.has([11]) == {})
        assert named in [world.chosen().worker.name for _ in range(4)], "it has a stream, and so stays a while"
        world.order(world.fleet.drain, named)
        world.until(lambda: world.has([11]) == {worker.url: (4, 0, 0, 0, 0)})
        assert (world.view(named).credit, world.view(named).why) == (False, "it drains")


def test_workers_of_a_node_join_and_leave_with_it(worker: Publishing, model: Path) -> None:
    with Publishing(model) as other, node(worker.url, other.url) as (kvd, at), World(nodes=[at]) as world:
        fleet = world.fleet
        world.until(lambda: {view.state for view in fleet.members()} == {"serving"} and len(fleet.members()) == 2)
        assert world.doors.open == {worker.url, other.url}
        busy = [world.chosen() for _ in range(2)]
        assert {choice.worker.name for choice in busy} == {worker.url, other.url}
        other.stop()
        world.until(lambda: fleet.state(other.url) == "unhealthy")
        kvd.kill()
        world.until(lambda: not world.view(worker.url).credit)
        assert fleet.state(other.url) == "unhealthy", "nobody says that it is gone"
        kvd.env["KVD_EVENTS__WORKERS"] = "[]"
        kvd.start()
        world.until(lambda: fleet.state(other.url) == "gone")
        world.until(lambda: "no node tells" in world.view(worker.url).why)
        assert fleet.state(worker.url) == "serving", "it answers: its node may have been told wrongly"
        world.order(fleet.drain, worker.url)
        for choice in busy:
            world.steering.finished(choice, "answered", 0.0)
        world.until(lambda: fleet.state(worker.url) == "gone")


def test_what_an_operator_removed_does_not_come_back_by_announcement(worker: Publishing) -> None:
    with node(worker.url) as (_, at), World(nodes=[at]) as world:
        world.until(lambda: world.fleet.state(worker.url) == "serving")
        world.order(world.fleet.remove, worker.url)
        for n in range(3):
            worker.events.do("store", 20 + n)
            world.settle()
            world.until(lambda n=n: world.fleet._nodes.index.match([20 + n]))
        assert world.fleet.members() == []
        world.order(world.fleet.add, worker.url)
        world.until(lambda: world.fleet.state(worker.url) == "serving")


def test_announced_workers_join_only_where_that_is_wanted(worker: Publishing) -> None:
    with MockWorker() as mine, node(worker.url) as (_, at), World(mine.url, nodes=[at], join_announced=False) as world:
        worker.events.do("store", 11)
        world.until(lambda: world.fleet._nodes.index.match([11]))
        world.settle()
        assert [view.name for view in world.fleet.members()] == [mine.url]


def test_pages_of_a_nodes_own_tiers_count_for_the_workers_attached_with_their_namespace(model: Path) -> None:
    with (
        Publishing(model, block=16) as worker, Publishing(model, block=16) as other,
        node(worker.url, other.url) as (kvd, at), World(worker.url, other.url, nodes=[at]) as world,
    ):  # fmt: skip
        world.until(lambda: world.view(worker.url).credit and world.view(other.url).credit)
        with RawWorker(kvd, server=f"{worker.mock.port}-{worker.mock.seed}") as rank:
            blocks = hashes(rank.put(6))
            world.until(lambda: world.has(blocks) == {worker.url: (0, 96, 0, 0, 0)})
            assert world.has(blocks[:3]) == {worker.url: (0, 48, 0, 0, 0)}, "the other cannot load them"
            other.events.do("store", 1, 2)
            salted = {worker.url: (0, 80, 0, 0, 0), other.url: (32, 0, 0, 0, 0)}
            world.until(lambda: world.has([1, 2, 3], stored=blocks[:5]) == salted)
        world.until(lambda: world.has(blocks) == {})
        with RawWorker(kvd, label="nobody's"):
            world.until(lambda: world.fleet._nodes.index.match(blocks))
            assert world.has(blocks) == {}, "nobody said whose rank it is"


def test_pages_of_requests_without_a_key_do_not_count_for_one_that_has_one(model: Path) -> None:
    scheme, ids = Scheme(16), list(range(96))
    key = Namespace(extra_key="b")
    events, stored = named(ids, scheme.names(key)), named(ids, scheme.stores(key))
    with (
        Publishing(model, block=16) as worker, node(worker.url) as (kvd, at), World(worker.url, nodes=[at]) as world,
        RawWorker(kvd, server=f"{worker.mock.port}-{worker.mock.seed}") as rank,
    ):  # fmt: skip
        assert hashes(rank.put(6)) == list(events) != list(stored)
        world.until(lambda: world.has(list(events)) == {worker.url: (0, 96, 0, 0, 0)})
        assert world.has(list(events), stored=stored) == {}
        worker.events.do("store", *events[:2])
        world.until(lambda: world.has(list(events), stored=stored) == {worker.url: (32, 0, 0, 0, 0)})


def test_pages_that_a_node_found_on_its_disk_take_nothing_from_its_workers(model: Path, tmp_path: Path) -> None:
    """It does not know their parents; the worker tells them."""
    disk = {"nvme__path": tmp_path / "nvme", "nvme__size_bytes": 64 << 20, "nvme__segment_bytes": 1 << 20}
    with Publishing(model, block=16) as worker:
        with node(worker.url, **disk, nvme__write_delay_s=0.05) as (kvd, _), RawWorker(kvd) as rank:
            blocks = hashes(rank.put(6))
            eventually(lambda: kvd.status().tiers[1].pages == 6, 15, "on disk")
        with (
            node(worker.url, **disk) as (kvd, at), World(worker.url, nodes=[at]) as world,
            RawWorker(kvd, server=f"{worker.mock.port}-{worker.mock.seed}"),
        ):  # fmt: skip
            world.until(lambda: world.has(blocks) == {worker.url: (0, 0, 96, 0, 0)})
            worker.events.do("store", *blocks)
            world.until(lambda: world.has(blocks) == {worker.url: (96, 0, 96, 0, 0)})
            worker.events.do("store", 71, 72, 73)
            world.until(lambda: world.has([71, 72, 73]) == {worker.url: (48, 0, 0, 0, 0)})


def test_what_loading_takes_is_what_the_node_has_measured(worker: Publishing, tmp_path: Path) -> None:
    disk = {"nvme__path": tmp_path / "nvme", "nvme__size_bytes": 64 << 20, "nvme__segment_bytes": 1 << 20}
    with (
        node(worker.url, **disk, nvme__write_delay_s=0.05) as (kvd, at), World(worker.url, nodes=[at]) as world,
        RawWorker(kvd, server=f"{worker.mock.port}-{worker.mock.seed}") as rank,
    ):  # fmt: skip
        rates = world.fleet.rates(worker.url)
        before = rates.load_s("shared", 1000)
        rank.put(6)
        world.until(lambda: world.fleet._nodes.speeds(at.events))
        (speed,) = world.fleet._nodes.speeds(at.events)
        shown = kvd.status().tiers[1].counters["loads_bytes_per_s"]
        assert (speed.medium, speed.bytes_per_s) == (wire.NVME, pytest.approx(shown, rel=0.06))
        world.until(lambda: rates._loads["nvme"] != LOAD["nvme"])
        assert rates._loads["nvme"] == (speed.latency_s, speed.bytes_per_s)
        assert rates.load_s("shared", 1000) == before


@pytest.mark.slow
def test_the_plugin_says_whose_rank_it_is_in(worker: Publishing) -> None:
    keys = span(6)
    blocks = hashes([bytes.fromhex(key) for key in keys])
    with (
        node(worker.url) as (kvd, at), World(worker.url, nodes=[at]) as world,
        PluginProcess(kvd.socket, "w", 0, 1, worker.mock.port, worker.mock.seed) as plugin,
    ):  # fmt: skip
        assert plugin.do("wait")
        plugin.do("put", keys=keys)
        world.until(lambda: world.has(blocks) == {worker.url: (0, 24, 0, 0, 0)})


def hashes(keys: list[bytes]) -> list[int]:
    return [int.from_bytes(key[:8], signed=True) for key in keys]


def test_two_nodes_of_one_name_are_two_nodes(worker: Publishing, model: Path) -> None:
    settings = {"events__node": "twin"}
    with (
        Publishing(model) as other, node(worker.url, **settings) as (_, one), node(other.url, **settings) as (_, two),
        World(worker.url, other.url, nodes=[one, two]) as world,
    ):  # fmt: skip
        worker.events.do("store", 11)
        other.events.do("store", 11, 12)
        world.until(lambda: world.has([11, 12]) == {worker.url: (4, 0, 0, 0, 0), other.url: (8, 0, 0, 0, 0)})


def test_a_worker_that_holds_more_than_it_says_it_can_is_not_believed(worker: Publishing, model: Path) -> None:
    worker.mock.set(info=describes(model, worker.events, max_total_num_tokens=8 * 4))
    with node(worker.url) as (_, at), World(worker.url, nodes=[at]) as world:
        worker.events.do("store", 1, 2)
        world.until(lambda: world.has([1, 2]) == {worker.url: (8, 0, 0, 0, 0)})
        worker.events.do("store", *range(100, 140))
        world.until(lambda: world.fleet.describe()["index_inexact"] == 1)
        assert world.has([1, 2]) == {}
        world.until(lambda: "more blocks than it says it can hold" in world.view(worker.url).why)
        worker.events.do("clear")
        worker.events.do("store", 5)
        world.until(lambda: world.has([5]) == {worker.url: (4, 0, 0, 0, 0)})
        world.until(lambda: world.view(worker.url).credit)


def test_who_found_no_room_in_the_index_is_told_anew_once_there_is_some(
    worker: Publishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "HEAL_S", 0.5)
    with node(worker.url) as (_, at), World(worker.url, nodes=[at], index_blocks=20) as world:
        worker.events.do("store", 1, 2)
        worker.events.do("store", *range(100, 140))
        world.until(lambda: world.fleet.describe()["index_inexact"] == 1)
        world.until(lambda: "index_blocks" in world.view(worker.url).why)
        worker.events.do("store", 5)
        worker.events.do("remove", *range(100, 140))
        world.until(lambda: world.has([1, 2]) == {worker.url: (8, 0, 0, 0, 0)})
        assert world.has([5]) == {worker.url: (4, 0, 0, 0, 0)}
        world.until(lambda: world.view(worker.url).credit)


def test_no_credit_is_said_where_the_node_does_not_know_all_that_a_worker_holds(model: Path) -> None:
    with Publishing(model, steps=2) as worker:
        for n in range(5):
            worker.events.do("store", 10 + n)
        with node(worker.url) as (_, at), World(worker.url, nodes=[at]) as world:
            world.until(lambda: world.fleet.manner(worker.url) and "before kvd listened" in world.view(worker.url).why)
            assert (world.has([14]), world.view(worker.url).credit) == ({}, False)
            assert "flush" in world.view(worker.url).remedy
            worker.events.do("clear")
            worker.events.do("store", 5)
            world.until(lambda: world.has([5]) == {worker.url: (4, 0, 0, 0, 0)})
            assert world.view(worker.url).credit


def test_a_node_that_is_not_there_harms_nobody(worker: Publishing, tmp_path: Path) -> None:
    nowhere = NodeAt(f"ipc://{tmp_path}/no", f"ipc://{tmp_path}/no.replay")
    with node(worker.url) as (_, at), World(worker.url, nodes=[nowhere, at]) as world:
        worker.events.do("store", 11)
        world.until(lambda: world.has([11]) == {worker.url: (4, 0, 0, 0, 0)})


def test_who_may_be_told_of_by_a_node_that_is_not_heard_is_told_which(worker: Publishing, tmp_path: Path) -> None:
    nowhere = NodeAt(f"ipc://{tmp_path}/no", f"ipc://{tmp_path}/no.replay")
    with World(worker.url, nodes=[nowhere]) as world:
        world.until(lambda: world.view(worker.url).why == "no node tells of its blocks")
        assert nowhere.events in world.view(worker.url).remedy
