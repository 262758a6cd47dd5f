"""kvdctl as an operator runs it: the real command in a process of its own, against a real daemon."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from kvd import __version__, wire
from tests.harness import Daemon
from tests.kvdctl import PAGE, RawWorker, kvdctl, on, other_version

COMMANDS = ("status", "tiers", "workers", "ls", "verify", "doctor", "explain", "evict", "export", "import")
NEEDS = {
    "evict": ("--all", "--yes"),
    "export": ("ab", "--to", "/no/such.arrow"),
}  # what a command does nothing without

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


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("doctor", "import")])
def test_without_a_daemon_a_command_says_so_in_one_line(command: str, tmp_path: Path) -> None:
    ran = kvdctl(command, *NEEDS.get(command, ()), KVD_RUN_DIR=str(tmp_path))
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.startswith(f"kvdctl: no kvd at {tmp_path}/kvd.sock")
    assert ran.stderr.count("\n") == 1
    ran = kvdctl(command, *NEEDS.get(command, ()), "--json", "--socket", str(tmp_path / "other.sock"))
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
