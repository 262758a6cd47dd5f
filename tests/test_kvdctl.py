"""kvdctl as an operator runs it: the real command in a process of its own, against a real daemon."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from kvd import __version__, wire
from kvd.client import Channels, Link
from kvd.ctl import verify
from kvd.ctl.checks import attached, memory, processes
from kvd.ctl.checks.finding import Finding, within, worst
from kvd.errors import KvdError, Refused, Unavailable
from kvd.leasetable import LeaseTable
from kvd.pages import KEY_BYTES, chain
from tests.harness import Daemon, eventually

PAGE = 64 << 10
COMMANDS = ("status", "tiers", "workers", "ls", "verify", "doctor")
MARK = processes.MARK


def kvdctl(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from kvd.ctl import app; app()", *arguments]
    given = {k: v for k, v in os.environ.items() if not k.startswith("KVD_")} | env
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)


def on(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return kvdctl(*arguments, "--socket", str(daemon.socket))


def doctor(daemon: Daemon) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and findings, without what other people's SGLang processes on this machine may add."""
    ran = on(daemon, "doctor", "--json")
    document = json.loads(ran.stdout)
    assert ran.stderr == ""
    assert ran.returncode == (1 if document["level"] == "red" else 0)
    for finding in document["checks"]:
        assert finding["level"] == "green" or finding["remedy"], f"no remedy: {finding}"
    return ran.returncode, document["checks"]


def of(findings: list[dict[str, Any]], check: str) -> list[dict[str, Any]]:
    return [finding for finding in findings if finding["check"] == check]


class RawWorker:
    """A worker without the plugin: attaches, joins one namespace, stores pages."""

    def __init__(self, daemon: Daemon, label: str = "raw", join: bool = True, scratch: bool = False) -> None:
        self.leases = LeaseTable()
        self.link = Link(daemon.socket, "worker", label, self.leases.fd, 5.0)
        self.channels = Channels(self.link.welcome)
        digest = os.urandom(16) if scratch else bytes(range(16))
        self.spec = wire.NamespaceSpec(digest, PAGE, 16, 0, 1, "kv", label, scratch=scratch)
        if join:
            self.link.ask(wire.Join([self.spec]), wire.Joined, 5.0)

    def put(self, pages: int, first: int = 0) -> list[bytes]:
        """Store a chain; its keys."""
        keys = chain(range(first, first + 16 * pages), 16)
        with self.channels.lend() as channel:
            for at in range(0, pages, 64):
                joined = b"".join(keys[at : at + 64])
                parent = keys[at - 1] if at else b""
                reserved = channel.ask(
                    lambda n, k=joined, p=parent: wire.ReservePages(n, 0, k, 5.0, p), wire.Reserved, 5.0
                )
                done = b""
                for offset, generation, verdict in wire.RESERVED_ROW.iter_unpack(reserved.rows):
                    if verdict == wire.WRITE:
                        data = os.urandom(PAGE)
                        self.link.arena[offset : offset + PAGE] = data
                        done += wire.COMMIT_ROW.pack(offset, generation, xxhash.xxh3_128_digest(data))
                number = reserved.reservation
                channel.ask(lambda n, r=number, d=done: wire.CommitPages(n, r, d), wire.Committed, 5.0)
        return keys

    def lease(self, keys: list[bytes], ttl_s: float = 60.0) -> list[int]:
        """Hold pages; where their bytes are."""
        with self.channels.lend() as channel:
            leased = channel.ask(lambda n: wire.LeasePages(n, 0, b"".join(keys), ttl_s), wire.Leased, 5.0)
        return [row[0] for row in wire.LEASED_ROW.iter_unpack(leased.rows)]

    def report(self, circuit: str, **counters: int) -> None:
        self.link.send(wire.Report(circuit, counters))
        self.link.ask(wire.Ping(1), wire.Pong, 5.0)

    def close(self) -> None:
        self.link.close()
        self.channels.close()
        self.leases.close()

    def __enter__(self) -> "RawWorker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """For tests that change nothing in the daemon."""
    with Daemon(tmp_path_factory.mktemp("kvdctl") / "run") as running:
        yield running


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# -- every command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_codes(command: str) -> None:
    ran = kvdctl(command, "--help")
    assert ran.returncode == 0
    assert f"  kvdctl {command}" in ran.stdout
    assert "Exit status: 0" in ran.stdout
    assert "3 no daemon reachable" in ran.stdout


def test_the_tool_lists_its_commands_and_its_version() -> None:
    ran = kvdctl("--help")
    assert all(f"\n  {command} " in ran.stdout for command in COMMANDS)
    assert "..." not in ran.stdout.partition("Commands:")[2]
    assert kvdctl("--version").stdout.strip() == f"kvdctl {__version__}"


@pytest.mark.parametrize("arguments", [("nonsense",), ("ls", "--limit", "0"), ("status", "--colour")])
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert kvdctl(*arguments).returncode == 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "doctor"])
def test_without_a_daemon_a_command_says_so_in_one_line(command: str, tmp_path: Path) -> None:
    ran = kvdctl(command, KVD_RUN_DIR=str(tmp_path))
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.startswith(f"kvdctl: no kvd at {tmp_path}/kvd.sock")
    assert ran.stderr.count("\n") == 1
    ran = kvdctl(command, "--json", "--socket", str(tmp_path / "other.sock"))
    assert (ran.returncode, ran.stdout) == (3, "")
    error = json.loads(ran.stderr)
    assert set(error) == {"error", "hint"}
    assert "other.sock" in error["error"]
    assert error["hint"]


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_stopped_daemon_is_not_waited_for(command: str, daemon: Daemon) -> None:
    daemon.signal(signal.SIGSTOP)
    started = time.monotonic()
    ran = on(daemon, command)
    assert ran.returncode == 3
    assert "is it stopped?" in ran.stderr
    assert time.monotonic() - started < 5


def test_a_refusal_exits_1(tmp_path: Path) -> None:
    with other_version(tmp_path / "kvd.sock") as path:
        ran = kvdctl("status", "--socket", str(path))
    assert ran.returncode == 1
    assert ran.stderr == "kvdctl: this kvd speaks protocol 99 (install the same version)\n"


@contextmanager
def other_version(path: Path) -> Iterator[Path]:
    """A daemon of the future: refuses everybody."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def refuse() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(wire.frame(wire.Refusal("this kvd speaks protocol 99", "install the same version")))

        thread = threading.Thread(target=refuse)
        thread.start()
        yield path
        thread.join()


# -- status, tiers, workers, ls ----------------------------------------------------------------------------


def test_status_shows_the_daemon(shared: Daemon) -> None:
    ran = on(shared, "status")
    assert ran.returncode == 0
    assert f"{__version__} at {shared.socket}" in ran.stdout
    assert re.search(r"^ram +[\d,]+ pages, .* of 64.0 MiB used", ran.stdout, re.M)


def test_status_as_json_has_every_field(shared: Daemon) -> None:
    ran = on(shared, "status", "--json")
    document = json.loads(ran.stdout)
    assert list(document) == list(wire.Status.__struct_fields__)
    assert document["pid"] == shared.status().pid
    assert list(document["tiers"][0]) == list(wire.TierStatus.__struct_fields__)


def test_the_run_dir_variable_leads_to_the_daemon(shared: Daemon) -> None:
    ran = kvdctl("tiers", "--json", KVD_RUN_DIR=str(shared.folder))
    assert [tier["name"] for tier in json.loads(ran.stdout)] == ["ram"]


def test_tiers_as_a_table(shared: Daemon) -> None:
    head, ram = on(shared, "tiers").stdout.splitlines()
    assert head.split()[:4] == ["tier", "used", "total", "full"]
    assert ram.split()[0] == "ram"


def test_workers_are_listed_without_their_escape_sequences(shared: Daemon) -> None:
    assert "No worker is attached" in on(shared, "workers").stdout
    with RawWorker(shared, "evil \x1b[31m[bold]red[/bold]") as worker:
        worker.report("open: kvd does not answer", get_pages=1234)
        table = on(shared, "workers").stdout
        (found,) = json.loads(on(shared, "workers", "--json").stdout)
    assert "\x1b" not in table
    assert "evil ?[31m[bold]red[/bold]" in table
    assert "1,234" in table
    assert found["pid"] == os.getpid()
    assert (found["pools"], found["shard"], found["circuit"]) == (["kv"], "1/1", "open: kvd does not answer")
    assert found["counters"] == {"get_pages": 1234}


def test_ls_names_prefixes_most_recent_first(daemon: Daemon) -> None:
    assert on(daemon, "ls").stdout == "No prefix is held.\n"
    with RawWorker(daemon, "model rank 0/1") as worker:
        worker.put(3)
        keys = worker.put(5, first=1000)
        worker.lease(keys[-1:])
        document = json.loads(on(daemon, "ls", "--json").stdout)
        table = on(daemon, "ls", "--limit", "1").stdout
    assert document["total"] == 2
    first, second = document["prefixes"]
    assert (first["key"], first["pages"], first["tokens"], first["bytes"]) == (keys[-1].hex(), 5, 80, 5 * PAGE)
    assert (first["leased"], second["leased"], second["pages"]) == (True, False, 3)
    assert first["label"] == "model rank 0/1 kv"
    assert keys[-1].hex()[:12] in table
    assert "1 of 2 prefixes; --limit shows more." in table


# -- verify ------------------------------------------------------------------------------------------------


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


# -- doctor: the daemon and the page's trip ----------------------------------------------------------------


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


# -- doctor: scratch pages ---------------------------------------------------------------------------------


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


# -- doctor: workers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("circuit", "remedy"),
    [
        ("open: kvd does not answer", "kvd stopped"),
        ("open: x", "worker's log"),
        ("off: cannot tell which weights this worker runs (set ...)", '"weights_id"'),
        ("off: ValueError: y", "kvd is OFF"),
    ],
)
def test_doctor_is_red_about_a_worker_without_the_cache(circuit: str, remedy: str, shared: Daemon) -> None:
    with RawWorker(shared, "model rank 0/1") as worker:
        worker.report(circuit)
        status, findings = doctor(shared)
    (finding,) = of(findings, "worker")
    assert (status, finding["level"]) == (1, "red")
    assert "model rank 0/1" in finding["message"]
    assert circuit.partition(": ")[2] in finding["message"]
    assert remedy in finding["remedy"]


def test_a_long_reason_reaches_the_doctor_and_costs_no_session(shared: Daemon) -> None:
    with RawWorker(shared) as worker:
        worker.report("off: " + "w" * 500)
        assert len(shared.status().workers[0].circuit) == 505


def a_worker(**changes: Any) -> wire.Status:
    worker = wire.WorkerStatus(1, 42, "m", 900.0, ["kv"], "1/1", "closed", 0, 0, {})
    return a_status(workers=[msgspec.structs.replace(worker, **changes)])


def a_status(**changes: Any) -> wire.Status:
    tier = wire.TierStatus("ram", 64 << 20, 0, 0, 0, 0, 0, 16, 16, 64 << 20)
    plain = wire.Status("1", 1, 1, 1.0, "s", "memfd, parked with systemd", 0, [tier], [], {}, 1, 8 << 20, [], [])
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "green"),
        ({"circuit": "open: not attached yet", "attached_s": 0.1}, "yellow"),
        ({"circuit": "open: not attached yet"}, "red"),
        ({"pools": [], "attached_s": 3.0}, "yellow"),
        ({"pools": []}, "red"),
        ({"circuit": "nonsense"}, "red"),
    ],
)
def test_a_starting_worker_is_yellow_at_most(changes: dict[str, Any], level: str) -> None:
    (finding,) = attached.workers(a_worker(**changes))
    assert finding.level == level


# -- doctor: SGLang processes ------------------------------------------------------------------------------

ATTACH = """
import sys
from pathlib import Path
from kvd.client import Link
from kvd.leasetable import LeaseTable
leases = LeaseTable()
link = Link(Path({socket!r}), "worker", "launched", leases.fd, 5.0)
sys.stdin.read()
"""
LAUNCH = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"


@contextmanager
def launched(code: str, *arguments: str, **env: str) -> Iterator[int]:
    """A process with the plugin's name in its command line; it ends when its input does."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, env={**os.environ, **env}
    )
    try:
        yield process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


def test_a_server_with_the_plugin_that_is_not_attached_is_red(shared: Daemon) -> None:
    with launched("import sys; sys.stdin.read()", MARK, KVD_RUN_DIR=str(shared.folder)) as pid:
        status, findings = doctor(shared)
    (lost,) = [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]
    assert (status, lost["level"]) == (1, "red")
    assert "may its user use the socket (mode 660" in lost["remedy"]


def test_a_server_that_looks_elsewhere_is_told_where_kvd_is(shared: Daemon, tmp_path: Path) -> None:
    extra = json.dumps({"module_path": MARK, "kvd": {"socket": str(tmp_path / "wrong.sock")}})
    with launched("import sys; sys.stdin.read()", "--extra", extra) as pid:
        _, findings = doctor(shared)
    (lost,) = [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]
    assert f"it looks for kvd at {tmp_path}/wrong.sock: set KVD_RUN_DIR={shared.folder}" in lost["remedy"]


def test_a_server_whose_child_is_attached_is_fine(shared: Daemon) -> None:
    child = ATTACH.format(socket=str(shared.socket))
    with launched(LAUNCH.format(child=child), MARK, KVD_RUN_DIR=str(shared.folder)) as pid:
        eventually(lambda: shared.status().workers, 5, "the child is attached")
        _, findings = doctor(shared)
    assert not [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]


def test_a_server_that_is_attached_to_another_kvd_is_fine(shared: Daemon, daemon: Daemon) -> None:
    code = ATTACH.format(socket=str(daemon.socket))
    with launched(code, MARK, KVD_RUN_DIR=str(daemon.folder)) as pid:
        eventually(lambda: daemon.status().workers, 5, "it is attached")
        _, findings = doctor(shared)
    assert not [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]


def test_shells_and_searches_are_not_servers() -> None:
    assert not processes._runs_plugin(["/bin/bash", "-c", f"python -m sglang.launch_server {MARK}"])
    assert not processes._runs_plugin(["grep", MARK])
    assert not processes._runs_plugin(["python", "-m", "sglang.launch_server"])
    assert not processes._runs_plugin([])
    assert processes._runs_plugin(["python3", "-m", "sglang.launch_server", f'{{"module_path": "{MARK}"}}'])


# -- doctor: memory ----------------------------------------------------------------------------------------


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_memlock_matters_only_where_memory_is_locked_or_pinned() -> None:
    assert only(memory.memlock(a_status())).level == "green"
    assert only(memory.memlock(a_status(gpus=["H100"]))).level == "yellow"
    assert only(memory.memlock(a_status(gpus=["H100"], memlock_bytes=-1))).level == "green"
    warned = only(memory.memlock(a_status(warnings=["memlock limit is below arena.size_bytes"])))
    assert (warned.level, "LimitMEMLOCK=infinity" in warned.remedy) == ("red", True)


def test_an_arena_that_is_not_faulted_in_is_yellow(tmp_path: Path) -> None:
    with Daemon(tmp_path / "run", arena__prefault="false") as daemon:
        _, findings = doctor(daemon)
    assert of(findings, "arena")[0]["level"] == "yellow"


def test_an_arena_larger_than_the_memory_is_red() -> None:
    tier = msgspec.structs.replace(a_status().tiers[0], bytes_total=1 << 60)
    assert only(memory.arena(a_status(tiers=[tier]))).level == "red"


def test_room_for_a_restart(tmp_path: Path) -> None:
    assert only(memory.room(a_status())).level == "green"
    file = tmp_path / "arena"
    place = f"{file}, kept by name"
    assert "is gone" in only(memory.room(a_status(arena=place))).message
    with file.open("wb") as sparse:
        sparse.truncate(1 << 42)
    assert only(memory.room(a_status(arena=place))).level == "red"
    file.write_bytes(bytes(4096))
    assert only(memory.room(a_status(arena=place))).level == "green"


def test_damage_that_was_found_stays_yellow(daemon: Daemon) -> None:
    with RawWorker(daemon) as worker:
        keys = worker.put(1)
        (offset,) = worker.lease(keys, ttl_s=0.1)
    flip(daemon.arena_path, offset)
    assert on(daemon, "verify").returncode == 1
    _, findings = doctor(daemon)
    (damage,) = of(findings, "damage")
    assert (damage["level"], "corrupt_payload 1" in damage["message"]) == ("yellow", True)


def test_other_warnings_of_the_daemon_are_passed_on() -> None:
    assert only(memory.warnings(a_status(warnings=["w", "memlock x"]))).message == "w"


# -- doctor: never hangs -----------------------------------------------------------------------------------


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
