"""kvdctl as an operator asks a router with it: why a request went there, who the workers are."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import __version__
from kvd.ctl.router.overhttp import exchange
from tests.harness import eventually
from tests.kvdctl import kvdctl
from tests.router_harness import MockWorker, Router, ToldRouter
from tests.told_router import A, B, C

NEW = "http://10.0.0.4:30000"


@pytest.fixture(scope="module")
def told() -> Iterator[ToldRouter]:
    with ToldRouter() as running:
        yield running


def on(router: ToldRouter, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return kvdctl(*arguments, KVD_ROUTER_URL=router.url, **env)


# -- explain ----------------------------------------------------------------------------------------------


def test_explain_says_where_a_request_went_and_why(told: ToldRouter) -> None:
    ran = on(told, "explain", "answered")
    assert (ran.returncode, ran.stderr) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in ran.stdout.partition("\n\n")[0].splitlines())
    assert facts["why"].startswith(f"{A} costs 0.")
    assert facts["actual"] == "0.250 s to the first token"
    assert facts["cached"] == "3,584 (87.5 %) of the prompt"
    assert facts["outcome"] == "answered after 3.000 s"
    table = ran.stdout.partition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in table] == ["candidate", A, *sorted((B, C), key=ran.stdout.index)]
    assert {"has", "running", "cost", "queue", "compute", "later"} <= set(table[0].split())
    assert "gpu 3584, ram 3840" in table[1]


def test_explain_shows_each_attempt_and_what_is_not_known_yet(told: ToldRouter) -> None:
    twice = on(told, "explain", "twice").stdout
    assert twice.count("went to") == 2
    assert f"why        {A} was" not in twice
    assert "outcome    unreachable after 0.100 s" in twice
    unfinished = on(told, "explain", "open").stdout
    assert "actual     no first token was seen" in unfinished
    assert "cached     the engine has not said" in unfinished
    assert "outcome    not over yet" in unfinished
    lone = on(told, "explain", "lone").stdout
    assert f"{A} was the only one that could take it" in lone
    assert "a prompt of about 4,096 tokens" in lone
    assert "tokens are not known, so it went by load alone (multimodal: a part of type image_url)" in lone


def test_explain_of_a_policy_without_seconds_shows_none(told: ToldRouter) -> None:
    said = on(told, "explain", "blocks").stdout
    assert "not by this policy" in said
    table = said.partition("\n\n")[2]
    assert "new prefill tokens" in table
    assert " s " not in table


def test_explain_as_json_and_the_last_requests(told: ToldRouter) -> None:
    (made,) = json.loads(on(told, "explain", "answered", "--json").stdout)["decisions"]
    assert (made["request"], made["worker"], made["cached_tokens"]) == ("answered", A, 3584)
    listed = on(told, "explain", "--requests", "--last", "3").stdout.splitlines()
    assert [line.split()[2] for line in listed[1:4]] == ["open", "answered", "twice"]
    assert listed[-1].startswith("3 of 6 ")


def test_explain_of_an_unknown_request_says_where_ids_are(told: ToldRouter) -> None:
    ran = on(told, "explain", "nobody\x1b[31m")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "knows no request" in ran.stderr
    assert "remembers the last 6 of 6" in ran.stderr
    assert "x-kvd-request-id" in ran.stderr
    assert "\x1b" not in ran.stderr
    assert kvdctl("explain", "x", "--requests").returncode == 2


# -- top and worker ---------------------------------------------------------------------------------------


def test_top_shows_workers_and_what_was_lost(told: ToldRouter) -> None:
    ran = on(told, "top", "--once")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    assert f"kvd-router {__version__} at {told.url}, policy kvd" in ran.stdout
    assert "available  204,800 tokens, 50.0 % of them" in ran.stdout
    assert "achieved   189,440 tokens, 92.5 % of those available" in ran.stdout
    assert "lost to    routing 7.5 %" in ran.stdout
    first, second, third = [line.rstrip() for line in ran.stdout.splitlines()[-3:]]
    assert first.split()[:5] == [A, "serving", "3", "1", "2,048"]
    assert {"87.5", "0.250"} <= set(first.split())
    assert second.endswith("yes")
    assert "no: its tokens are not the router's" in third
    document = json.loads(on(told, "top", "--json").stdout)
    assert document["ledger"]["percent"]["lost_to_routing"] == 7.5
    assert len(document["workers"]["workers"]) == 3


def test_top_on_a_terminal_refreshes_until_interrupted_and_waits_for_a_router_that_went() -> None:
    master, slave = pty.openpty()
    with ToldRouter() as told:
        command = [sys.executable, "-c", "from kvd.ctl import app; app()", "top", "--router", told.url]
        process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        os.close(slave)
        said = bytearray()

        def read() -> None:
            while True:
                try:
                    said.extend(os.read(master, 65536))
                except OSError:  # nobody has the other end any more
                    return

        reading = threading.Thread(target=read)
        reading.start()
        try:
            eventually(lambda: said.count(b"\x1b[H\x1b[2J") >= 2, 20, "it drew twice")
            told.close()
            eventually(lambda: b"These figures are old" in said, 20, "it says that they are old")
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            reading.join()
            os.close(master)
    assert b"Traceback" not in said


def test_workers_come_and_go_in_every_process_of_a_router() -> None:
    """Which process a connection meets is chance: each must be told once, and only once."""
    with ToldRouter(processes=3) as told:
        for arguments, says in (
            (("add", NEW), f"{NEW} joins."),
            (("drain", A), f"{A} gets nothing new"),
            (("remove", B), f"{B} is gone."),
        ):
            ran = on(told, "worker", *arguments)
            assert (ran.returncode, ran.stderr) == (0, "")
            assert ran.stdout.startswith(says)
        document = json.loads(on(told, "worker", "list", "--json").stdout)
        assert {one["name"]: one["state"] for one in document["workers"]} == {
            A: "draining", C: "serving", NEW: "joining",
        }  # fmt: skip
        top = on(told, "top", "--once").stdout
        assert ", 3 processes" in top
        assert "of 300 requests" in top, "what each of them counted"
        again = on(told, "worker", "remove", B)
        assert (again.returncode, f"there is no worker {B}" in again.stderr) == (1, True)
        assert json.loads(on(told, "explain", "--requests", "--json").stdout)["total"] == 18


def change(told: ToldRouter, what: str, worker: str) -> None:
    """In whichever process the connection meets."""
    exchange(told.url, "POST", f"/kvd/workers/{what}", json.dumps({"worker": worker}).encode(), "", 3.0)


def test_a_worker_that_has_drained_in_some_processes_is_drained_or_removed_in_the_others() -> None:
    with ToldRouter(processes=3) as told:
        change(told, "remove", A)  # as one that had nothing left to answer there
        drained = on(told, "worker", "drain", A)
        assert (drained.returncode, drained.stderr) == (0, "")
        removed = on(told, "worker", "remove", A)
        assert (removed.returncode, removed.stderr) == (0, "")
        assert A not in [one["name"] for one in json.loads(on(told, "worker", "list", "--json").stdout)["workers"]]
        again = on(told, "worker", "remove", A)
        assert (again.returncode, f"there is no worker {A}" in again.stderr) == (1, True)


def test_where_some_processes_cannot_add_a_worker_it_is_said_that_others_did() -> None:
    with ToldRouter(processes=3) as told:
        change(told, "add", NEW)
        ran = on(told, "worker", "add", NEW)
        assert (ran.returncode, f"{NEW} is there already" in ran.stderr) == (1, True)
        assert "others of its processes did it" in ran.stderr
        after = on(told, "worker", "add", NEW)
        assert (after.returncode, "others of its" in after.stderr) == (1, False), "each was told"


def test_worker_list_says_what_is_missing(told: ToldRouter) -> None:
    said = on(told, "worker", "list").stdout
    assert "message 2 of the chat canary, at token 17 -> give the router its model folder" in said


def test_a_real_router_of_two_processes_by_load(tmp_path: Path) -> None:
    with MockWorker() as worker, Router(tmp_path, worker.url, listen__processes=2) as router:
        document = json.loads(kvdctl("worker", "list", "--json", "--router", router.url).stdout)
        assert [one["name"] for one in document["workers"]] == [worker.url]
        assert document["policy"] == "kvd"
        assert "decided nothing yet" in kvdctl("explain", "--requests", "--router", router.url).stdout
        assert "--enable-cache-report" in kvdctl("top", "--once", "--router", f"127.0.0.1:{router.port}").stdout
        added = kvdctl("worker", "add", NEW.removeprefix("http://"), "--router", router.url)
        assert added.stdout == f"{NEW} joins.\n"
        refused = kvdctl("worker", "drain", B, "--router", router.url)
        assert (refused.returncode, B in refused.stderr) == (1, True)
