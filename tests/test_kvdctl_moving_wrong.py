"""kvdctl export and import where something is wrong: killed in the middle, damaged, no room, no such file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvd.storage.shared.sealed import lay_out
from tests.harness import Daemon, eventually
from tests.kvdctl import PAGE, RawWorker, flip, on
from tests.moving import export, put_one, refused, take_in, written_file
from tests.tier_contract import filled, sample


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
        put_one(worker, 0, orphan, bytes([8]) * 32, bytes(PAGE))  # nobody has its parent
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
