"""`kvdctl doctor`: can the daemon be reached, does a page come through, is nothing left of it; and no check hangs."""

import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest

from kvd import wire
from kvd.ctl.checks import processes
from kvd.ctl.checks.finding import Finding, within, worst
from kvd.errors import Refused, Unavailable
from tests.harness import Daemon, eventually
from tests.kvdctl import PAGE, RawWorker, doctor, kvdctl, of, on, only, other_version

# -- the daemon and the page's trip ------------------------------------------------------------------------


def test_doctor_is_green_on_a_healthy_node_and_leaves_nothing(daemon: Daemon) -> None:
    _, findings = doctor(daemon)
    ours = [f for f in findings if f["check"] != processes.CHECK]
    assert [f["level"] for f in ours] == ["green"] * len(ours), ours
    assert {f["check"] for f in findings} == {
        "daemon", "page trip", "worker", "sglang", "arena", "room", "memlock", "damage",
    }  # fmt: skip
    (trip,) = of(findings, "page trip")
    assert trip["figures"]["page_bytes"] == 256 << 10
    assert 0 < trip["figures"]["lease_us"] < trip["figures"]["total_us"]
    eventually(lambda: daemon.status().tiers[0].pages == 0, 5, "the page is gone")
    status = daemon.status()
    assert (status.workers, status.tiers[0].bytes_used) == ([], 0)
    assert status.counters["messages_from_strangers"] == 0
    assert daemon.faults() == []


def test_doctor_prints_a_line_per_finding(shared: Daemon) -> None:
    ran = on(shared, "doctor")
    *lines, summary = ran.stdout.splitlines()
    assert all(re.match(r"(green|yellow|red) +\S", line) for line in lines)
    assert re.search(r"^green +page trip +256 KiB were stored and read back, the same, in \d+ us", ran.stdout, re.M)
    assert summary.endswith("green")
    assert "\x1b" not in ran.stdout


def test_doctor_without_a_daemon_names_the_start_command(tmp_path: Path) -> None:
    ran = kvdctl("doctor", "--json", KVD_RUN_DIR=str(tmp_path))
    document = json.loads(ran.stdout)
    assert ran.returncode == 3
    assert document["level"] == "red"
    assert document["socket"] == f"{tmp_path}/kvd.sock"
    daemon, room = document["checks"]
    assert "systemctl start kvd" in daemon["remedy"] or "there is a socket at" in daemon["remedy"]
    assert room["check"] == "room"


def test_doctor_tells_a_dead_daemons_socket_from_none(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "kvd.sock"))
    ran = kvdctl("doctor", KVD_RUN_DIR=str(tmp_path))
    assert ran.returncode == 3
    assert re.search(r"^red +daemon .*-> kvd died and left its socket", ran.stdout, re.M)


def test_doctor_on_a_stopped_daemon_is_red_within_seconds(daemon: Daemon) -> None:
    daemon.signal(signal.SIGSTOP)
    started = time.monotonic()
    ran = on(daemon, "doctor")
    assert time.monotonic() - started < 5
    assert ran.returncode == 3
    assert re.search(r"^red +daemon .*did not answer.*-> it is stopped", ran.stdout, re.M)


def test_doctor_on_another_version_says_what_to_install(tmp_path: Path) -> None:
    with other_version(tmp_path / "kvd.sock") as path:
        ran = kvdctl("doctor", "--json", "--socket", str(path))
    assert ran.returncode == 1
    (finding,) = json.loads(ran.stdout)["checks"]
    assert (finding["level"], finding["remedy"]) == ("red", "install the same version")


def test_doctor_costs_a_full_arena_at_most_one_page(tmp_path: Path) -> None:
    with Daemon(tmp_path / "run", arena_mib=8, extent_mib=4) as daemon, RawWorker(daemon) as worker:
        worker.put(140)
        before = daemon.status().tiers[0]
        assert before.free_extents == 0
        _, findings = doctor(daemon)
        (trip,) = of(findings, "page trip")
        assert (trip["level"], trip["figures"]["page_bytes"]) == ("green", PAGE)
        eventually(lambda: len(daemon.status().workers) == 1, 5)
        assert before.pages - daemon.status().tiers[0].pages <= 1
        assert daemon.faults() == []


def test_doctor_is_yellow_when_everything_is_leased(tmp_path: Path) -> None:
    with Daemon(tmp_path / "run", arena_mib=4, extent_mib=4) as daemon, RawWorker(daemon) as worker:
        keys = worker.put(64)
        held = [offset for offset in worker.lease(keys) if offset]
        assert len(held) == daemon.status().tiers[0].pages
        _, findings = doctor(daemon)
    (trip,) = of(findings, "page trip")
    assert trip["level"] == "yellow"
    assert "no room" in trip["message"]


# -- scratch pages -----------------------------------------------------------------------------------------


def test_scratch_pages_leave_with_their_session(daemon: Daemon) -> None:
    with RawWorker(daemon) as keeper, RawWorker(daemon, scratch=True) as worker:
        keeper.put(2)
        worker.put(7)
        assert daemon.status().tiers[0].pages == 9
        worker.close()
        eventually(lambda: daemon.status().tiers[0].pages == 2, 5)
    assert daemon.faults() == []


def test_a_namespace_in_use_cannot_become_scratch(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker, RawWorker(daemon, scratch=True) as other:
        stolen = msgspec.structs.replace(worker.spec, scratch=True)
        with pytest.raises(Refused):
            other.link.ask(wire.Join([stolen]), wire.Joined, 5.0)
        with pytest.raises(Refused):
            worker.link.ask(wire.Join([msgspec.structs.replace(other.spec, scratch=False)]), wire.Joined, 5.0)
        fresh = msgspec.structs.replace(other.spec, digest=os.urandom(16))
        with pytest.raises(Refused):
            other.link.ask(wire.Join([fresh, msgspec.structs.replace(fresh, scratch=False)]), wire.Joined, 5.0)
        assert other.link.ask(wire.Join([other.spec, fresh]), wire.Joined, 5.0).ids == [0, 1]


def test_pages_of_before_a_restart_cannot_become_scratch(tmp_path: Path) -> None:
    with Daemon(tmp_path / "run") as daemon:
        with RawWorker(daemon) as worker:
            worker.put(2)
        daemon.kill()
        daemon.start()
        stolen = wire.Join([msgspec.structs.replace(worker.spec, scratch=True)])
        with RawWorker(daemon, join=False) as other, pytest.raises(Refused):
            other.link.ask(stolen, wire.Joined, 5.0)
        assert daemon.status().tiers[0].pages == 2


def test_a_scratch_page_that_a_scan_reads_stays_an_ordinary_page(daemon: Daemon) -> None:
    with RawWorker(daemon, scratch=True) as worker:
        worker.put(1)
        tool = daemon.tool()
        scanned = tool.ask(wire.Scan(0, 8), wire.Scanned, 5.0)
        worker.close()
    eventually(lambda: not daemon.status().workers, 5)
    tool.send(wire.EndScan(scanned.lease))
    assert daemon.status().tiers[0].pages == 1
    assert daemon.faults() == []
    tool.close()


# -- never hangs -------------------------------------------------------------------------------------------


def test_a_check_that_blocks_is_red_and_left_behind() -> None:
    gate = threading.Event()

    def blocks() -> list[Finding]:
        gate.wait(10)
        return []

    assert only(within(0.05, "stuck", blocks)).level == "red"
    gate.set()


def test_a_check_that_fails_is_red() -> None:
    def bug() -> list[Finding]:
        raise ZeroDivisionError

    def away() -> list[Finding]:
        raise Unavailable("kvd hung up")

    assert "ZeroDivisionError" in only(within(1, "bug", bug)).message
    assert only(within(1, "away", away)).remedy
    assert worst(within(1, "bug", bug)) == "red"
    assert worst([]) == "green"
