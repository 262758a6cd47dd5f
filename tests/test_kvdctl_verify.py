"""`kvdctl verify`: every page is read again, and what is damaged is found and never served."""

import json
import os
import pty
import subprocess
import sys

import pytest

from kvd import wire
from kvd.ctl import verify
from kvd.errors import KvdError
from kvd.pages import KEY_BYTES
from tests.harness import Daemon
from tests.kvdctl import PAGE, RawWorker, flip, on


def test_verify_visits_every_page(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        worker.put(150)
    document = json.loads(on(daemon, "verify", "--json").stdout)
    assert (document["pages"], document["shards"], document["bytes"]) == (150, 150, 150 * PAGE)
    assert (document["bad"], document["faults"]) == ([], [])
    ran = on(daemon, "verify")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("150 pages, 9.4 MiB read in ")
    assert ran.stdout.endswith("All is right.\n")


def test_a_flipped_bit_is_found_and_its_page_never_served_again(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        keys = worker.put(100)
        (offset,) = worker.lease([keys[70]], ttl_s=0.1)
        flip(daemon.arena_path, offset + 4321)
        ran = on(daemon, "verify", "--json")
        assert ran.returncode == 1
        (bad,) = json.loads(ran.stdout)["bad"]
        assert bad == {
            "namespace": worker.spec.digest.hex(), "key": keys[70].hex(), "offset": offset, "what": "payload",
        }  # fmt: skip
        assert worker.lease([keys[70]]) == [0]
        again = on(daemon, "verify")
        assert again.returncode == 0
        assert again.stdout.startswith("99 pages")
    status = daemon.status()
    assert status.counters["corrupt_payload"] == 1
    assert status.tiers[0].pages == 99
    assert daemon.faults() == []


def test_a_damaged_header_is_found(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        keys = worker.put(3)
    at = daemon.arena_path.read_bytes().find(worker.spec.digest + keys[1])
    flip(daemon.arena_path, at + 16 + 2 * KEY_BYTES)  # the checksum that the header holds
    ran = on(daemon, "verify")
    assert ran.returncode == 1
    assert f"damaged header: page {keys[1].hex()}" in ran.stdout
    assert "quarantined" in ran.stdout
    assert on(daemon, "verify").returncode == 0


def test_verify_shows_its_progress_on_a_terminal(shared: Daemon) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-c", "from kvd.ctl import app; app()", "verify", "--socket", str(shared.socket)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, timeout=20)
    os.close(slave)
    shown = os.read(master, 1 << 16)
    os.close(master)
    assert ran.returncode == 0
    assert b"checking pages" in shown
    assert b"checking" not in ran.stdout


def test_a_batch_that_outlives_its_lease_is_read_again_in_smaller_parts(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RawWorker(daemon) as worker:
        worker.put(2)
    monkeypatch.setattr(verify, "_BATCH_BUDGET_S", 0.0)
    link = daemon.tool()
    asked: list[int] = []
    monkeypatch.setattr(wire, "Scan", lambda cursor, limit, scan=wire.Scan: asked.append(limit) or scan(cursor, limit))
    with pytest.raises(KvdError, match="takes longer"):
        verify.walk(link, lambda pages: None)
    link.close()
    assert asked == [64, 8, 1]
    assert daemon.status().counters.get("corrupt_payload", 0) == 0
