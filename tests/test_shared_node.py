"""Real daemons that share one folder and nothing else: what one stored, the other gives back."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import wire
from tests.harness import MIB, Daemon, PluginProcess, eventually, reattached, span
from tests.kvdctl import RawWorker, doctor, of, on


def node(folder: Path, name: str, **settings: object) -> Daemon:
    chosen: dict[str, object] = {
        "shared__uri": folder / "shared", "shared__node": name, "shared__poll_s": 0.2, "shared__write_delay_s": 0.05,
        "shared__quota_bytes": 512 * MIB,
    }  # fmt: skip
    return Daemon(folder / name, 16, 4, **{**chosen, **settings})


def shared(daemon: Daemon) -> wire.TierStatus:
    return next(tier for tier in daemon.status().tiers if tier.name == "shared")


def ready(daemon: Daemon) -> None:
    eventually(lambda: all(not tier.trouble for tier in daemon.status().tiers), 20, "the lower tiers work")


def holds(daemon: Daemon, pages: int) -> None:
    eventually(lambda: shared(daemon).pages >= pages, 20, f"{pages} pages are in the shared tier")


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Daemon]:
    with node(tmp_path, "first") as daemon:
        ready(daemon)
        yield daemon


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Daemon]:
    with node(tmp_path, "second") as daemon:
        ready(daemon)
        yield daemon


def test_what_one_node_stored_the_other_gives_back(first: Daemon, second: Daemon) -> None:
    with PluginProcess(first.socket) as here, PluginProcess(second.socket) as there:
        assert here.do("wait")
        assert there.do("wait")
        here.do("put", keys=span(60))
        holds(second, 60)
        eventually(lambda: there.do("exists", keys=span(60)) == 60, 5)
        assert there.do("take", keys=span(60)) == ["right"] * 60
    assert second.status().counters["pages_promoted"] == 60
    assert first.faults() == second.faults() == []


def test_a_page_that_the_other_node_has_is_not_written_again(first: Daemon, second: Daemon, tmp_path: Path) -> None:
    with PluginProcess(first.socket) as here, PluginProcess(second.socket) as there:
        assert here.do("wait")
        assert there.do("wait")
        here.do("put", keys=span(60))
        holds(second, 60)
        there.do("put", keys=span(60))
        eventually(lambda: shared(second).counters["waiting_to_be_written"] == 0, 10)
        there.do("put", keys=span(60, 1))
        holds(first, 120)
        holds(second, 120)
        written = {folder.name: len(list(folder.glob("*.pages.arrow"))) for folder in (tmp_path / "shared").iterdir()}
        assert written == {"first": 1, "second": 1}


def test_a_node_that_died_leaves_its_pages(first: Daemon, second: Daemon) -> None:
    with PluginProcess(first.socket) as here:
        assert here.do("wait")
        here.do("put", keys=span(60))
        holds(second, 60)
    first.kill()
    first.arena_path.unlink()
    with PluginProcess(second.socket) as there:
        assert there.do("wait")
        assert there.do("take", keys=span(60)) == ["right"] * 60
    first.start()
    ready(first)
    with PluginProcess(first.socket) as here:
        assert here.do("wait")
        assert here.do("take", keys=span(60)) == ["right"] * 60


def test_what_a_tenant_holds_is_known_to_nodes_that_it_never_came_to(tmp_path: Path) -> None:
    tenants = json.dumps({"raw": {"shared_reserve_bytes": MIB, "shared_burst_bytes": 100_000_000}})
    with node(tmp_path, "first", tenants=tenants) as here, node(tmp_path, "second", tenants=tenants) as there:
        ready(here)
        ready(there)
        with RawWorker(here, tenant="raw") as worker:
            worker.put(4)
            holds(there, 4)
            written = (tmp_path / "shared").glob("*/*.pages.arrow")
            expected = {
                "tenant": "raw",
                "tier": "shared",
                "held_bytes": sum(path.stat().st_size for path in written),
                "reserve_bytes": MIB,
                "burst_bytes": 100_000_000,
            }
            for daemon in (here, there):
                eventually(lambda d=daemon: json.loads(on(d, "quota", "--json").stdout)[-1] == expected, 10)


def test_three_tiers_the_disk_is_asked_first(tmp_path: Path) -> None:
    disk = {"nvme__path": tmp_path / "nvme", "nvme__size_bytes": 64 * MIB, "nvme__segment_bytes": 8 * MIB}
    with node(tmp_path, "both", **disk, nvme__write_delay_s=0.05) as daemon, PluginProcess(daemon.socket) as worker:
        ready(daemon)
        assert worker.do("wait")
        worker.do("put", keys=span(60))
        holds(daemon, 60)
        eventually(lambda: daemon.status().tiers[1].pages == 60, 10)
        daemon.kill()
        daemon.arena_path.unlink()
        daemon.start()
        ready(daemon)
        reattached(worker)
        assert worker.do("take", keys=span(60)) == ["right"] * 60
        assert [tier.hits for tier in daemon.status().tiers[1:]] == [60, 0]
        assert daemon.faults() == []


def test_a_folder_that_cannot_be_used_is_a_red_line(tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("a file, not a folder")
    with node(tmp_path, "alone") as daemon, PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(20))
        assert worker.do("take", keys=span(20)) == ["right"] * 20
        eventually(lambda: shared(daemon).trouble not in ("opening", "not started yet"), 10)
        status, findings = doctor(daemon)
        (red,) = of(findings, "shared")
        assert (status, red["level"]) == (1, "red")


def test_where_nothing_may_be_written_kvdctl_says_what_stays_and_the_tier_reads_on(
    first: Daemon, tmp_path: Path
) -> None:
    (tmp_path / "shared" / "second").symlink_to("/sys")  # not even root may make files there
    with node(tmp_path, "second") as second, PluginProcess(first.socket) as here:
        ready(second)
        assert here.do("wait")
        here.do("put", keys=span(20))
        holds(second, 20)
        ran = on(second, "evict", "--all", "--yes")
        assert (ran.returncode, "shared: NOT all: shared tier: [Errno" in ran.stdout) == (1, True)
        with PluginProcess(second.socket) as there:
            assert there.do("wait")
            assert there.do("take", keys=span(20)) == ["right"] * 20
        counters = shared(second).counters
        assert (counters["restarts"], shared(second).pages) == (0, 20)
        assert {"read_only", "no_permission"} & counters.keys()
        assert second.faults() == []
