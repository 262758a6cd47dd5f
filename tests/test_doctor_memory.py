"""`kvdctl doctor` about the arena's memory, and tiers below it: their limits, their room, their damage."""

from pathlib import Path

import msgspec
import pytest

from kvd.ctl.checks import lower, memory
from tests.harness import Daemon
from tests.kvdctl import RawWorker, a_status, doctor, flip, of, on, only


def test_memlock_matters_only_where_memory_is_locked_or_pinned() -> None:
    assert only(memory.memlock(a_status())).level == "green"
    assert only(memory.memlock(a_status(gpus=["H100"]))).level == "yellow"
    assert only(memory.memlock(a_status(gpus=["H100"], memlock_bytes=-1))).level == "green"
    warned = only(memory.memlock(a_status(warnings=["the memlock limit was lowered"])))
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


def test_the_remedy_for_too_few_descriptors_is_in_the_unit() -> None:
    warned = only(memory.warnings(a_status(warnings=["7 of 8 descriptors are in use: raise LimitNOFILE"])))
    assert ("unit" in warned.remedy, "kvd.toml" in warned.remedy) == (True, False)


@pytest.mark.parametrize(
    ("reason", "said"), [("no_permission", "may not write"), ("read_only", "read-only"), ("disk_full", "no room")]
)
def test_a_tier_that_only_reads_is_yellow_and_says_why(reason: str, said: str) -> None:
    ram = a_status().tiers[0]
    reads = msgspec.structs.replace(ram, name="shared", counters={reason: 1})
    found = only(lower.tiers(a_status(tiers=[ram, reads])))
    assert (found.level, said in found.message) == ("yellow", True)
