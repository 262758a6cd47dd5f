"""kvdctl export and import for tests: run on a daemon, and files as a shared tier writes them."""

import json
from collections.abc import Sequence
from pathlib import Path

import xxhash

from kvd import wire
from kvd.storage.shared.sealed import lay_out
from kvd.storage.tier import Page
from tests.harness import Daemon
from tests.kvdctl import RawWorker, on


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


def put_one(worker: RawWorker, ns: int, key: bytes, parent: bytes, data: bytes) -> None:
    """Store one page, whoever its parent is."""
    with worker.channels.lend() as channel:
        reserved = channel.ask(lambda n: wire.ReservePages(n, ns, key, 5.0, parent), wire.Reserved, 5.0)
        offset, generation, _ = wire.RESERVED_ROW.unpack(reserved.rows)
        worker.link.arena[offset : offset + len(data)] = data
        row = wire.COMMIT_ROW.pack(offset, generation, xxhash.xxh3_128_digest(data))
        channel.ask(lambda n: wire.CommitPages(n, reserved.reservation, row), wire.Committed, 5.0)
