"""kvdctl doctor of a router: every state has its colour and its remedy; several processes are shown as one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvd import __version__
from kvd.ctl.checks import routing
from kvd.ctl.checks.finding import Finding, within
from kvd.ctl.router import summed
from kvd.errors import Refused
from kvd.router.pages import replies
from tests.harness import Daemon
from tests.kvdctl import kvdctl, of, on
from tests.router_harness import ToldRouter, free_port
from tests.told_router import C


@pytest.fixture(scope="module")
def told() -> Iterator[ToldRouter]:
    with ToldRouter() as running:
        yield running


def doctor(told: ToldRouter, folder: Path, *arguments: str, **env: str) -> list[dict[str, Any]]:
    """Of a node without a daemon: what it says of the router."""
    ran = kvdctl("doctor", "--json", *arguments, KVD_RUN_DIR=str(folder), **env)
    assert ran.returncode == 3, "there is no daemon"
    return of(json.loads(ran.stdout)["checks"], "router")


def test_doctor_looks_at_a_router_where_one_is_named(told: ToldRouter, tmp_path: Path) -> None:
    assert doctor(told, tmp_path) == []
    found = doctor(told, tmp_path, "--router", told.url)
    assert found == doctor(told, tmp_path, KVD_ROUTER_URL=told.url)
    assert [finding["level"] for finding in found] == ["green", "green", "green", "red", "green"]
    parity = found[3]
    assert parity["message"].startswith(f"{C} gets requests, but none for what it has cached: its tokens are not")
    assert parity["remedy"] == "give the router its model folder: model_path"
    (gone,) = doctor(told, tmp_path, "--router", f"http://127.0.0.1:{free_port()}")
    assert (gone["level"], "start it with `kvd-router`" in gone["remedy"]) == ("red", True)


def test_a_machine_without_kvd_is_well_for_who_came_to_look_at_a_router(told: ToldRouter, tmp_path: Path) -> None:
    if not (os.geteuid() == 0 and not Path("/run/kvd").exists()):
        pytest.skip("this machine may have a kvd of its own")
    ran = kvdctl("doctor", "--json", "--router", told.url)
    daemon, *found = json.loads(ran.stdout)["checks"]
    assert ran.returncode == 1, "of the worker without credit"
    assert (daemon["check"], daemon["level"], len(of(found, "router"))) == ("daemon", "green", len(found))
    gone = kvdctl("doctor", "--router", f"http://127.0.0.1:{free_port()}")
    assert gone.returncode == 3
    assert kvdctl("doctor", KVD_ROUTER_URL=told.url).returncode == 3, "a variable says nothing of why one came"
    named = kvdctl("doctor", "--router", told.url, "--socket", str(tmp_path / "kvd.sock"))
    assert named.returncode == 3


def test_of_a_named_router_that_does_not_answer_the_status_is_3_also_beside_a_kvd(shared: Daemon) -> None:
    gone = on(shared, "doctor", "--router", f"http://127.0.0.1:{free_port()}")
    assert (gone.returncode, "no router at" in gone.stdout) == (3, True)


def test_a_failed_check_of_a_router_points_to_the_routers_log(tmp_path: Path) -> None:
    def refused() -> list[Finding]:
        raise Refused("no")

    (finding,) = within(1.0, routing.CHECK, refused, unit="kvd-router")
    assert finding.remedy == "look at `journalctl -u kvd-router`"


def said(*workers: replies.Worker, policy: str = "kvd", version: str = __version__) -> replies.Workers:
    return replies.Workers(policy=policy, workers=list(workers), version=version)


def levels(*workers: replies.Worker, policy: str = "kvd") -> list[tuple[str, bool]]:
    """Colour of each, and whether it says what to do."""
    return [(each.level, bool(each.remedy)) for each in routing.each_worker(said(*workers, policy=policy))]


def test_every_state_of_a_worker_has_its_colour_and_its_remedy() -> None:
    states = ("serving", "joining", "draining", "unhealthy", "gone")
    assert levels(*(replies.Worker("a", state, credit=True) for state in states)) == [
        ("green", False), ("yellow", True), ("yellow", True), ("red", True), ("red", True),
    ]  # fmt: skip
    (finding,) = routing.each_worker(said(replies.Worker("a", "unhealthy", credit=True, health="it says 503")))
    assert finding.message == "a is unhealthy: it says 503"
    both = replies.Worker("a", "unhealthy", credit=False, why="no node", remedy="name it", health="it says 503")
    (finding,) = routing.each_worker(said(both))
    assert (finding.message, "name it" in finding.remedy) == ("a is unhealthy: it says 503", False)
    inexact = replies.Worker("a", "serving", credit=False, why="node-1 is not known exactly", remedy="look at its kvd")
    (finding,) = routing.each_worker(said(inexact))
    assert (finding.level, finding.remedy) == ("red", "look at its kvd")
    assert "node-1 is not known exactly" in finding.message
    assert levels(replies.Worker("a", "serving", credit=False)) == [("red", True)]
    assert levels(replies.Worker("a", "serving", credit=False), policy=routing.BY_LOAD) == [("green", False)]


def test_a_router_without_workers_or_of_another_version_is_not_green() -> None:
    assert routing.answers("u", said()).level == "red"
    assert routing.answers("u", said(version="0.0.9")).level == "yellow"
    assert routing.answers("u", said(replies.Worker("a", "serving", credit=True))).level == "green"


def ledger(requests: int, lag: int) -> replies.Ledger:
    return replies.Ledger(requests=requests, tokens=2000, available=1000, achieved=1000 - lag, lost={"lag": lag})


def test_lag_is_red_above_a_few_percent_of_enough_requests() -> None:
    assert [finding.level for finding in routing.losses(ledger(100, 30))] == ["green"]
    assert [finding.level for finding in routing.losses(ledger(100, 31))] == ["red"]
    assert routing.losses(ledger(49, 500)) == []
    assert routing.losses(replies.Ledger(requests=100)) == []


# -- several processes as one -----------------------------------------------------------------------------


def test_the_worst_that_a_process_says_of_a_worker_is_shown_and_counts_are_added() -> None:
    lately = replies.Recent(60.0, 2, 1, 100, 50, 1, 0.5, 0.25)
    well = replies.Worker("a", "serving", credit=True, running=3, connections=1, recent=lately)
    sick = msgspec.structs.replace(well, state="unhealthy", credit=False, why="it does not answer", running=2)
    for order in ((well, sick), (sick, well)):
        (shown,) = summed.workers([said(one) for one in order]).workers
        assert (shown.state, shown.why, shown.running, shown.connections) == ("unhealthy", "it does not answer", 3, 2)
        assert shown.recent == replies.Recent(60.0, 4, 2, 200, 100, 2, 1.0, 0.5)
    total = summed.ledger([ledger(10, 100), ledger(20, 0)])
    assert (total.requests, total.available, total.achieved, total.lost) == (30, 2000, 1900, {"lag": 100})
    assert total.percent == {"available": 50.0, "achieved": 95.0, "lost_to_lag": 5.0}
