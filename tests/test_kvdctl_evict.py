"""kvdctl evict as an operator runs it: out of memory and out of the disk, for good."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kvd import wire
from tests.harness import MIB, Daemon, eventually
from tests.kvdctl import RawWorker, on
from tests.test_nvme_node import nvme, process_of, ready, reboot, two_tiers, written


def held(worker: RawWorker, keys: list[bytes]) -> int:
    with worker.channels.lend() as channel:
        return channel.ask(lambda n: wire.Lookup(n, 0, b"".join(keys), 0.001), wire.Found, 5.0).pages


def test_a_prefix_leaves_by_the_beginning_of_its_key(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        keys, other = worker.put(6), worker.put(3, first=1000)
        ran = on(daemon, "evict", keys[2].hex()[:12], "--yes", "--json")
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout) == {"ram": 4, "held": 0, "tiers": []}
        assert (held(worker, keys), held(worker, other)) == (2, 3)
    assert daemon.faults() == []
    daemon.kill()
    daemon.start()
    assert daemon.status().warm_pages == 5, "memory that outlives kvd does not bring them back"


def test_it_asks_first_and_takes_no_for_an_answer(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        keys = worker.put(3)
        ran = on(daemon, "evict", keys[0].hex())
        assert ran.returncode == 1
        assert "would evict page" in ran.stderr
        assert "--yes" in ran.stderr
        assert held(worker, keys) == 3


@pytest.mark.parametrize("arguments", [(), ("--all", "abc"), ("--all", "--namespace", "00" * 16)])
def test_it_wants_to_know_what(shared: Daemon, arguments: tuple[str, ...]) -> None:
    assert on(shared, "evict", *arguments).returncode == 2


def test_keys_that_name_nothing_or_too_much(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        for first in range(40):  # 16 beginnings for 40 keys
            worker.put(1, first=1000 * first)
        begin = Counter(prefix["key"][0] for prefix in json.loads(on(daemon, "ls", "--json").stdout)["prefixes"])
        (often, count), *_ = begin.most_common()
        assert count > 1
        several = on(daemon, "evict", often, "--yes")
        assert (several.returncode, several.stdout) == (1, "")
    assert "several keys begin with" in several.stderr
    assert "is no page key" in on(daemon, "evict", "xyz", "--yes").stderr
    assert "is no namespace" in on(daemon, "evict", "--namespace", "12", "--yes").stderr
    assert "no page in memory has a key" in on(daemon, "evict", "0123456789ab", "--yes").stderr
    nowhere = on(daemon, "evict", "ab" * 32, "--yes")
    assert nowhere.returncode == 1
    assert "no such page is held" in nowhere.stderr


def test_what_is_read_stays_and_is_counted(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        keys = worker.put(5)
        worker.lease(keys[:2])
        ran = on(daemon, "evict", keys[0].hex(), "--yes")
        assert ran.returncode == 1
        assert "3 pages evicted" in ran.stdout
        assert "2 pages stayed" in ran.stdout
        assert held(worker, keys) == 2


def test_evicted_pages_stay_gone_after_a_restart(tmp_path: Path) -> None:
    with two_tiers(tmp_path) as daemon:
        ready(daemon)
        with RawWorker(daemon) as worker:
            keys, other = worker.put(20), worker.put(10, first=5000)
            written(daemon, 30)
            ran = on(daemon, "evict", keys[5].hex()[:16], "--yes", "--json")
            assert ran.returncode == 0, ran.stderr
            told = {"tier": "nvme", "pages": 15, "trouble": ""}
            assert json.loads(ran.stdout) == {"ram": 15, "held": 0, "tiers": [told]}
            assert (held(worker, keys), held(worker, other)) == (5, 10)
        reboot(daemon)
        assert nvme(daemon).pages == 15
        with RawWorker(daemon) as worker:
            assert (held(worker, keys), held(worker, other)) == (5, 10)
        assert daemon.faults() == []


def test_a_page_that_only_the_disk_has_goes_by_its_whole_key(tmp_path: Path) -> None:
    with two_tiers(tmp_path) as daemon:
        ready(daemon)
        with RawWorker(daemon) as worker:
            keys = worker.put(20)
            written(daemon, 20)
        reboot(daemon)
        ran = on(daemon, "evict", keys[12].hex(), "--yes")
        assert ran.returncode == 0, ran.stderr
        assert "nvme: 8 pages removed" in ran.stdout
        with RawWorker(daemon) as worker:
            assert held(worker, keys) == 12
        everything = on(daemon, "evict", "--all", "--yes")
        assert everything.returncode in (0, 1), everything.stderr  # the lookup above holds what it found, for a moment
        assert nvme(daemon).counters["waiting_to_be_written"] == 0


def test_a_namespace_leaves_all_tiers_of_a_node(tmp_path: Path) -> None:
    shared = {"shared__uri": tmp_path / "shared", "shared__quota_bytes": 64 * MIB, "shared__write_delay_s": 0.05}
    with two_tiers(tmp_path, **shared) as daemon, RawWorker(daemon) as worker:
        ready(daemon)
        keys = worker.put(20)
        written(daemon, 20)
        eventually(lambda: daemon.status().tiers[2].pages == 20, 20)
        ran = on(daemon, "evict", "--namespace", worker.spec.digest.hex(), "--yes", "--json")
        assert ran.returncode == 0, ran.stderr
        assert [(t["tier"], t["pages"]) for t in json.loads(ran.stdout)["tiers"]] == [("nvme", 20), ("shared", 20)]
        assert held(worker, keys) == 0
        worker.put(20)
        written(daemon, 20)
        assert daemon.faults() == []


def test_a_tier_that_does_not_work_is_said(tmp_path: Path) -> None:
    with two_tiers(tmp_path) as daemon, RawWorker(daemon) as worker:
        ready(daemon)
        keys = worker.put(20)
        written(daemon, 20)
        process_of(daemon).kill()
        ran = on(daemon, "evict", keys[0].hex(), "--yes")
        if ran.returncode:  # else it was back before we asked
            assert "nvme: NOT all" in ran.stdout
            assert "run this again" in ran.stdout
        ready(daemon)
        on(daemon, "evict", keys[0].hex(), "--yes")
        assert held(worker, keys) == 0
        assert daemon.faults() == []
