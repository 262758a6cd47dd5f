"""kvdctl export and import as an operator runs them: from one real kvd to another, byte for byte, come what may."""

import json
import subprocess
import sys
import time
from pathlib import Path

from kvd import wire
from kvd.storage.shared import SharedTier
from kvd.storage.shared.stamps import at
from tests.harness import Daemon, PluginProcess, span
from tests.kvdctl import PAGE, RawWorker, on
from tests.moving import export, put_one, take_in, written_file
from tests.test_nvme_node import ready, reboot, two_tiers, written
from tests.tier_contract import filled, held, sample


def test_what_was_exported_there_is_the_same_here(here: Daemon, there: Daemon, tmp_path: Path) -> None:
    with PluginProcess(there.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(200))
        worker.do("put", keys=span(20, 1))
        worker.do("put", keys=span(30, 2))
        told = export(there, tmp_path / "two.arrow", span(200)[-1][:12], span(20, 1)[-1])
    assert told["pages"] == 220
    assert take_in(here, tmp_path / "two.arrow") == (220, 0, 0, 0)
    (long, short) = sorted(json.loads(on(here, "ls", "--json").stdout)["prefixes"], key=lambda p: -p["pages"])
    assert (long["pages"], long["tokens"], long["label"], short["pages"]) == (200, 800, "m kv", 20)
    with PluginProcess(here.socket) as worker:
        assert worker.do("wait")
        assert worker.do("exists", keys=span(200)) == 200
        assert worker.do("take", keys=span(200)) == ["right"] * 200
        assert worker.do("take", keys=span(20, 1)) == ["right"] * 20
        assert worker.do("exists", keys=span(30, 2)) == 0
        assert take_in(here, tmp_path / "two.arrow") == (0, 220, 0, 0), "again is harmless"
    assert here.faults() == there.faults() == []


def test_all_shards_of_a_page_travel(here: Daemon, there: Daemon, tmp_path: Path) -> None:
    with PluginProcess(there.socket, "w", 0, 2) as first, PluginProcess(there.socket, "w", 1, 2) as second:
        for rank in (first, second):
            assert rank.do("wait")
            rank.do("put", keys=span(40))
        told = export(there, tmp_path / "tp.arrow", span(40)[-1])
    assert told["pages"] == 40
    assert take_in(here, tmp_path / "tp.arrow") == (40, 0, 0, 0)
    with PluginProcess(here.socket, "w", 0, 2) as first, PluginProcess(here.socket, "w", 1, 2) as second:
        for rank in (first, second):
            assert rank.do("wait")
            assert rank.do("take", keys=span(40)) == ["right"] * 40
    assert here.faults() == []


def test_a_side_pools_pages_come_along(here: Daemon, there: Daemon, tmp_path: Path) -> None:
    """They do not hang together, and not every page has one."""
    with RawWorker(there) as worker:
        family = bytes(16)
        side = wire.NamespaceSpec(bytes(range(16, 32)), 4096, 16, 0, 1, "mamba", "raw", family)
        kv = wire.NamespaceSpec(worker.spec.digest, PAGE, 16, 0, 1, "kv", "raw", family)
        number = worker.link.ask(wire.Join([kv, side]), wire.Joined, 5.0).ids[1]
        keys = worker.put(10)
        for key in (keys[4], keys[9]):
            put_one(worker, number, key, b"", b"state of " + key + bytes(4096 - 41))
        told = export(there, tmp_path / "x.arrow", keys[-1].hex()[:20])
    assert told["pages"] == 12
    assert take_in(here, tmp_path / "x.arrow") == (12, 0, 0, 0)
    found = json.loads(on(here, "ls", "--json").stdout)["prefixes"]
    assert sorted((p["pages"], p["label"]) for p in found) == [(1, "raw mamba"), (1, "raw mamba"), (10, "raw kv")]


def test_another_model_does_not_find_it(here: Daemon, there: Daemon, tmp_path: Path) -> None:
    with PluginProcess(there.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(10))
        export(there, tmp_path / "a.arrow", span(10)[-1])
    assert take_in(here, tmp_path / "a.arrow") == (10, 0, 0, 0)
    with PluginProcess(here.socket, "other weights") as worker:
        assert worker.do("wait")
        assert worker.do("exists", keys=span(10)) == 0


def test_pages_that_went_to_a_disk_are_exported_too(here: Daemon, tmp_path: Path) -> None:
    with two_tiers(tmp_path) as daemon:
        ready(daemon)
        with PluginProcess(daemon.socket) as worker:
            assert worker.do("wait")
            worker.do("put", keys=span(60))
            written(daemon, 60)
        reboot(daemon)
        key = span(60)[-1]
        nobody = on(daemon, "export", key, "--to", str(tmp_path / "x.arrow"))
        assert nobody.returncode == 1
        assert "a worker of its model" in nobody.stderr
        with PluginProcess(daemon.socket) as worker:
            assert worker.do("wait")
            assert export(daemon, tmp_path / "x.arrow", key)["pages"] == 60
    assert take_in(here, tmp_path / "x.arrow") == (60, 0, 0, 0)


def test_imported_pages_go_to_the_disk_like_any(tmp_path: Path, there: Daemon) -> None:
    with PluginProcess(there.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(60))
        export(there, tmp_path / "x.arrow", span(60)[-1])
    with two_tiers(tmp_path) as daemon:
        ready(daemon)
        assert take_in(daemon, tmp_path / "x.arrow") == (60, 0, 0, 0)
        written(daemon, 60)
        reboot(daemon)
        with PluginProcess(daemon.socket) as worker:
            assert worker.do("wait")
            assert worker.do("exists", keys=span(60)) == 60
            assert worker.do("take", keys=span(60)) == ["right"] * 60


def test_the_file_is_a_shared_tiers(there: Daemon, tmp_path: Path) -> None:
    with RawWorker(there) as worker:
        keys = worker.put(12)
        folder = tmp_path / "tier" / "elsewhere"
        folder.mkdir(parents=True)
        stamp = at(time.time() + 60)  # files are named by a moment after all their pages came
        export(there, folder / f"{stamp:016x}-{0:016x}.pages.arrow", keys[-1].hex())
        tier = SharedTier(str(tmp_path / "tier"), "me", 1 << 30)
        try:
            assert held(tier) == {worker.spec.digest + key for key in keys}
            pages = tier.find([worker.spec.digest + key for key in keys])
            assert [page.parent for page in pages if page] == [bytes(32), *keys[:-1]]
        finally:
            tier.close()


def test_a_file_of_a_shared_tier_is_imported_with_what_is_known(here: Daemon, tmp_path: Path) -> None:
    samples = [filled(sample(number, 20_000, 2)) for number in range(9)]
    file = written_file(tmp_path / "x.pages.arrow", samples)
    assert take_in(here, file) == (9, 0, 0, 0)
    (prefix,) = json.loads(on(here, "ls", "--json").stdout)["prefixes"]
    assert (prefix["pages"], prefix["tokens"], prefix["bytes"]) == (9, 9 * 16, 9 * 40_000)
    assert prefix["namespace"] == samples[0][0].namespace.hex()
    assert here.faults() == []


def test_chains_in_several_files_meet(here: Daemon, tmp_path: Path) -> None:
    samples = [filled(sample(number, 20_000)) for number in range(10)]
    late = written_file(tmp_path / "late.arrow", samples[4:])
    early = written_file(tmp_path / "early.arrow", samples[:5])
    assert take_in(here, late, early) == (10, 0, 0, 0)
    (prefix,) = json.loads(on(here, "ls", "--json").stdout)["prefixes"]
    assert prefix["pages"] == 10


def test_the_documented_snippet_reads_an_exported_file(there: Daemon, tmp_path: Path) -> None:
    with RawWorker(there) as worker:
        keys = worker.put(3)
        export(there, tmp_path / "x.arrow", keys[-1].hex())
    text = (Path(__file__).parents[1] / "docs/shared-tier.md").read_text()
    snippet = text.split("## Moving prefixes")[1].split("```python\n")[1].split("```")[0]
    alone = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.modules['kvd'] = None\n{snippet}",
        str(tmp_path / "x.arrow"),
    ]
    shown = subprocess.run(alone, check=True, capture_output=True, text=True).stdout
    assert shown.splitlines() == [f"{key.hex()} 16 tokens {PAGE} bytes" for key in keys]
