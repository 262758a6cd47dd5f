"""kvdctl export and import as an operator runs them: from one real kvd to another, byte for byte, come what may."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import xxhash

from kvd import wire
from kvd.storage.shared import SharedTier
from kvd.storage.shared.sealed import lay_out
from kvd.storage.shared.stamps import at
from kvd.storage.tier import Page
from tests.harness import Daemon, PluginProcess, eventually, span
from tests.kvdctl import PAGE, RawWorker, flip, on
from tests.test_nvme_node import ready, reboot, two_tiers, written
from tests.tier_contract import filled, held, sample


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "here") as running:
        yield running


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "there") as running:
        yield running


def export(daemon: Daemon, to: Path, *keys: str) -> dict[str, object]:
    ran = on(daemon, "export", *keys, "--to", str(to), "--json")
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout))


def take_in(daemon: Daemon, *files: Path, status: int = 0) -> tuple[int, int, int, int]:
    """(new, held, refused, damaged)"""
    ran = on(daemon, "import", *map(str, files), "--json")
    assert ran.returncode == status, ran.stderr
    told = json.loads(ran.stdout)
    return told["new"], told["held"], told["refused"], told["damaged"]


def refused(daemon: Daemon, *files: Path) -> str:
    """Why nothing was imported."""
    ran = on(daemon, "import", *map(str, files))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("kvdctl: ")
    assert daemon.status().tiers[0].pages == 0
    return ran.stderr


def written_file(path: Path, samples: Sequence[tuple[Page, list[memoryview]]], namespaces: str = "") -> Path:
    """As a shared tier writes one."""
    sheet = lay_out(samples, [1] * len(samples), "elsewhere", namespaces)
    path.write_bytes(b"".join(sheet.parts)[: sheet.size])
    return path


# -- there and back ----------------------------------------------------------------------------------------


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
            _put_one(worker, number, key, b"", b"state of " + key + bytes(4096 - 41))
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


# -- what goes wrong ---------------------------------------------------------------------------------------


def test_kvd_is_killed_during_an_import_and_the_next_one_completes_it(there: Daemon, tmp_path: Path) -> None:
    with RawWorker(there) as worker:
        keys = worker.put(700)
        export(there, tmp_path / "x.arrow", keys[-1].hex())
        places = worker.lease(keys)
        right = [worker.link.arena[offset : offset + PAGE] for offset in places]
    with Daemon(tmp_path / "here") as here:
        command = [sys.executable, "-c", "from kvd.ctl import app; app()", "import", str(tmp_path / "x.arrow")]
        with subprocess.Popen(
            [*command, "--socket", str(here.socket)], stderr=subprocess.PIPE, text=True
        ) as importing:
            eventually(lambda: here.status().tiers[0].pages > 0, 10)
            here.kill()
            _, error = importing.communicate(timeout=20)
        assert importing.returncode == 3, "it ended before kvd did"
        assert "kvd hung up" in error
        here.start()
        before = here.status().tiers[0].pages
        assert 0 < before < 700
        new, held_, *bad = take_in(here, tmp_path / "x.arrow")
        assert (new, held_, bad) == (700 - before, before, [0, 0])
        with RawWorker(here) as reader:
            assert [reader.link.arena[offset : offset + PAGE] for offset in reader.lease(keys)] == right
        assert here.faults() == []


def test_a_damaged_page_is_left_out_and_said(here: Daemon, tmp_path: Path) -> None:
    samples = [filled(sample(number, 20_000)) for number in range(6)]
    file = written_file(tmp_path / "x.arrow", samples)
    sheet = lay_out(samples, [1] * 6, "elsewhere")
    flip(file, sheet.rows[2].offset + 100)
    assert take_in(here, file, status=1) == (5, 0, 0, 1)
    pages = json.loads(on(here, "ls", "--json").stdout)["prefixes"]
    assert samples[2][0].key.hex() not in {page["key"] for page in pages}
    assert on(here, "verify").returncode == 0
    table = on(here, "import", str(file))
    assert table.returncode == 1
    assert "1 pages are DAMAGED" in table.stdout
    written_file(file, samples)
    assert take_in(here, file) == (1, 5, 0, 0)


def test_without_room_it_is_said(tmp_path: Path) -> None:
    with Daemon(tmp_path / "run", 8, 4) as daemon, RawWorker(daemon) as worker:
        full = worker.put(64) + worker.put(64, first=10_000)
        worker.lease(full)
        file = written_file(tmp_path / "x.arrow", [filled(sample(number, PAGE)) for number in range(10)])
        new, held_, no_room, damaged = take_in(daemon, file, status=1)
        assert (held_, damaged) == (0, 0)
        assert no_room > 0
        assert new + no_room == 10


@pytest.mark.parametrize(
    ("name", "why", "remedy"),
    [
        ("missing", "cannot be read: No such file", "is the path right?"),
        ("folder", "is not a file", "give files of kvdctl export"),
        ("text", "is not an Arrow file", "give files of kvdctl export"),
        ("cut", "is cut short", "copy it again"),
        ("foreign", "is an Arrow file, but not one of kvd's pages", "give files of kvdctl export"),
        ("index", "is damaged", "copy it again"),
        ("version", "has another version of the format", "the version of kvd that runs here"),
        ("notes", "is damaged", "copy it again"),
        ("sizes", "pages of 1 x 8,192 bytes, 16 tokens; those of", "was not made by a worker of this model"),
        ("spec", "pages of 1 x 4,096 bytes, 16 tokens; those of", "was not made by a worker of this model"),
    ],
)
def test_a_file_that_cannot_be_right_stores_nothing(
    tmp_path: Path, shared: Daemon, name: str, why: str, remedy: str
) -> None:
    good = written_file(tmp_path / "good.arrow", [filled(sample(50, 4096)), filled(sample(51, 4096))])
    bad = tmp_path / name
    whole = good.read_bytes()
    match name:
        case "folder":
            bad.mkdir()
        case "text":
            bad.write_text("hello")
        case "cut":
            bad.write_bytes(whole[:-2000])
        case "foreign":
            import pyarrow as pa  # type: ignore[import-untyped]

            table = pa.table({"a": list(range(4000))})
            with pa.OSFile(str(bad), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        case "index":
            spot = whole.rindex(b"KVDINDEX") - 20
            bad.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :])
        case "version":
            spot = whole.rindex(b"KVDINDEX") + 8
            bad.write_bytes(whole[:spot] + b"\x09" + whole[spot + 1 :])
        case "notes":
            written_file(bad, [filled(sample(1, 4096))], "{not json")
        case "sizes":
            written_file(bad, [filled(sample(1, 4096)), filled(sample(2, 8192))])
        case "spec":
            note = {
                "namespace": sample(1).page.namespace.hex(), "page_bytes": 8192, "page_tokens": 16, "shards": 1,
                "pool": "kv", "label": "m",
            }  # fmt: skip
            written_file(bad, [filled(sample(1, 4096))], json.dumps([note]))
    error = refused(shared, good, bad)
    assert str(bad) in error
    assert why in error
    assert remedy in error
    assert shared.faults() == []


def test_a_page_size_that_is_not_the_workers_here_is_refused(here: Daemon, tmp_path: Path) -> None:
    with RawWorker(here) as worker:
        page, buffers = filled(sample(1, 4096))
        file = written_file(tmp_path / "x.arrow", [(page._replace(namespace=worker.spec.digest), buffers)])
        error = refused(here, file)
        assert "pages of 1 x 4,096 bytes" in error
        assert f"have 1 x {PAGE:,} bytes, 16 tokens, as here" in error
        page, buffers = filled(sample(1, PAGE))
        other = written_file(tmp_path / "y.arrow", [(page._replace(namespace=worker.spec.digest, tokens=4), buffers)])
        assert "bytes, 4 tokens; those of" in refused(here, other)


def test_exports_that_cannot_be_made_leave_no_file(there: Daemon, tmp_path: Path) -> None:
    to = tmp_path / "x.arrow"
    with RawWorker(there) as worker:
        keys = worker.put(5)
        to.write_text("mine")
        taken = on(there, "export", keys[-1].hex(), "--to", str(to))
        assert (taken.returncode, to.read_text()) == (1, "mine")
        assert "exists" in taken.stderr
        to.unlink()
        unknown = on(there, "export", "0123456789", "--to", str(to))
        assert "no page has a key that begins with 0123456789" in unknown.stderr
        nowhere = on(there, "export", keys[-1].hex(), "--to", str(tmp_path / "no" / "x.arrow"))
        assert "is the folder there" in nowhere.stderr
        orphan = bytes([7]) * 32
        _put_one(worker, 0, orphan, bytes([8]) * 32, bytes(PAGE))  # nobody has its parent
        broken = on(there, "export", orphan.hex(), "--to", str(to))
        assert "is not whole" in broken.stderr
        (offset,) = worker.lease(keys[2:3], 0.01)
        flip(there.arena_path, offset + 5)
        damaged = on(there, "export", keys[-1].hex(), "--to", str(to))
        assert "has changed, or is damaged" in damaged.stderr
        assert {ran.returncode for ran in (unknown, nowhere, broken, damaged)} == {1}
        assert list(tmp_path.glob("*.arrow*")) == list(tmp_path.glob(".*")) == []
        eventually(lambda: there.status().counters.get("corrupt_payload") == 1, 5)
        assert there.faults() == []


def _put_one(worker: RawWorker, ns: int, key: bytes, parent: bytes, data: bytes) -> None:
    with worker.channels.lend() as channel:
        reserved = channel.ask(lambda n: wire.ReservePages(n, ns, key, 5.0, parent), wire.Reserved, 5.0)
        offset, generation, _ = wire.RESERVED_ROW.unpack(reserved.rows)
        worker.link.arena[offset : offset + len(data)] = data
        row = wire.COMMIT_ROW.pack(offset, generation, xxhash.xxh3_128_digest(data))
        channel.ask(lambda n: wire.CommitPages(n, reserved.reservation, row), wire.Committed, 5.0)
