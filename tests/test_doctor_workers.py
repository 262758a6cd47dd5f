"""`kvdctl doctor` about the workers that are attached: does each of them use the cache?"""

from typing import Any

import msgspec
import pytest

from kvd import wire
from kvd.ctl.checks import attached
from tests.harness import Daemon
from tests.kvdctl import RawWorker, a_status, doctor, of


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
