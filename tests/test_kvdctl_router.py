"""kvdctl as an operator asks a router with it: why a request went there, who the workers are."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvd import __version__
from kvd.ctl.router.link import RouterLink
from kvd.ctl.router.overhttp import exchange
from kvd.errors import DeadlineMissed, KvdError, PeerError, Refused
from kvd.router.pages import replies
from kvd.router.tenants import digest
from tests.harness import eventually
from tests.kvdctl import kvdctl
from tests.router_harness import MockWorker, Router, ToldRouter, free_port
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


# -- errors -----------------------------------------------------------------------------------------------

ASKING = (("explain", "x"), ("explain", "--requests"), ("top",), ("worker", "add", NEW))


@pytest.mark.parametrize("arguments", ASKING)
def test_without_a_router_a_command_says_so_in_one_line(arguments: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ran = kvdctl(*arguments, "--router", url)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.startswith(f"kvdctl: no router at {url}")
    assert "--router URL or KVD_ROUTER_URL" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert set(json.loads(kvdctl(*arguments, "--json", "--router", url).stderr)) == {"error", "hint"}


def test_a_worker_a_silent_host_and_nonsense_are_no_router() -> None:
    with MockWorker(status=404) as worker:
        ran = kvdctl("worker", "list", "--router", worker.url)
        assert (ran.returncode, "is no kvd-router (check the URL" in ran.stderr) == (1, True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = RouterLink(f"http://127.0.0.1:{silent.getsockname()[1]}", "", timeout_s=0.1)
        with pytest.raises(DeadlineMissed, match=r"did not answer within 0\.1 s"):
            link.ask("/kvd/workers", replies.Workers)
    for url in ("ftp://a", "http://a/b", "http://a:x", "http://"):
        with pytest.raises(KvdError, match="no router's address"):
            RouterLink(url, "")


@contextmanager
def saying(**answers: dict[str, object] | bytes | int) -> Iterator[str]:
    """The URL of what answers with these at the pages of these names, bytes or what a router's process
    1 would say, which says nothing at any other."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = answers.get(self.path.partition("?")[0].removeprefix("/kvd/"), {})
            body = json.dumps({"pid": 1} | said).encode() if isinstance(said, dict) else bytes(said)
            self.send_response(int(answers.get("status", 200)))  # type: ignore[arg-type]
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


NO_TEXT = b'{"policy": "\xff"}'
DEEP = b'{"x": %b}' % (b"[" * 100_000)


@pytest.mark.parametrize("body", [NO_TEXT, DEEP])
def test_an_answer_that_is_no_text_or_too_deep_is_not_understood(body: bytes) -> None:
    with saying(workers=body) as url, pytest.raises(PeerError, match="is not understood"):
        RouterLink(url, "").ask("/kvd/workers", replies.Workers)
    wrong = body.replace(b"policy", b"error")
    with saying(workers=wrong, status=500) as url, pytest.raises(Refused, match="HTTP 500"):
        RouterLink(url, "").ask("/kvd/workers", replies.Workers)


def test_what_cannot_be_sent_is_refused_in_words(tmp_path: Path) -> None:
    no_text = os.fsdecode(b"http://\xff")
    with saying(workers={"policy": "kvd", "workers": []}) as url:
        link = RouterLink(url, "")
        with pytest.raises(KvdError, match="is no text"):
            link.change("add", no_text)
        with pytest.raises(KvdError, match="is no text"):
            link.ask("/kvd/decisions", replies.Decisions, request=no_text)
    ran = kvdctl("worker", "list", "--json", "--key-file", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert (ran.returncode, set(json.loads(ran.stderr))) == (1, {"error", "hint"})


def test_nothing_that_a_router_or_its_operator_names_reaches_the_terminal_as_a_command() -> None:
    candidate = {"worker": A, "matched": {}, "cost": 1.0, "terms": {"\x1b[31mred": 1.0, "[/x]": 2.0}}
    made = {"request": "r", "age_s": 1.0, "policy": "p", "tokens": 5, "worker": A, "why": "y", "candidates": 1}
    with saying(decisions={"decisions": [made | {"ranked": [candidate]}], "total": 1, "kept": 1}) as url:
        ran = kvdctl("explain", "r", KVD_ROUTER_URL=url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    assert {"?[31mred", "[/x]"} <= set(ran.stdout.split())
    with saying(workers={"policy": "kvd", "workers": []}) as url:
        ran = kvdctl("worker", "add", "http://a\x1b[31mb:1", KVD_ROUTER_URL=url)
    assert (ran.returncode, ran.stdout) == (0, "http://a?[31mb:1 joins.\n")


def test_a_decision_without_candidates_is_listed() -> None:
    made = {"request": "r", "age_s": 1.0, "policy": "p", "tokens": 5, "worker": A, "why": "y", "ranked": []}
    with saying(decisions={"decisions": [made | {"candidates": 0}], "total": 1, "kept": 1}) as url:
        ran = kvdctl("explain", "--requests", KVD_ROUTER_URL=url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[1].split()[2:6] == ["r", "5", A, "-"]


def test_any_json_is_not_a_router(tmp_path: Path) -> None:
    with saying(workers=b"{}", ledger=b"{}") as url:
        ran = kvdctl("top", "--once", "--router", url)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "is no kvd-router (check the URL" in ran.stderr


def test_a_few_requests_a_minute_are_not_none_and_one_is_no_plural() -> None:
    recent = {"within_s": 60.0, "requests": 2}
    worker = {"name": A, "state": "serving", "credit": True, "recent": recent}
    made = {"request": "r", "age_s": 1.0, "policy": "p", "tokens": 5, "worker": A, "why": "y", "ranked": []}
    decided: dict[str, object] = {"decisions": [made | {"candidates": 1}], "total": 1, "kept": 1}
    with saying(workers={"policy": "kvd", "workers": [worker], "waiting": 1}, decisions=decided) as url:
        top = kvdctl("top", "--once", KVD_ROUTER_URL=url).stdout
        assert "1 request in its queue" in top
        assert top.splitlines()[-1].split()[5] == "0.033"
        assert "policy p, 1 candidate)" in kvdctl("explain", "r", KVD_ROUTER_URL=url).stdout


def test_the_remedy_for_want_of_credit_is_not_shown_for_a_worker_that_is_unhealthy() -> None:
    worker = {"name": A, "state": "unhealthy", "credit": False, "why": "no node tells of it", "remedy": "name it"}
    with saying(workers={"policy": "kvd", "workers": [worker | {"health": "its /health says 503"}]}) as url:
        line = kvdctl("worker", "list", KVD_ROUTER_URL=url).stdout.splitlines()[-1]
    assert line.endswith("its /health says 503")


def test_a_key_is_taken_from_the_environment_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(
        f'[root]\nsha256 = ["{digest(b"secret").hex()}"]\nadmin = true\nshared = true\n'
        f'[alice]\nsha256 = ["{digest(b"hers").hex()}"]\nshared = true\n'
    )
    (tmp_path / "key").write_text("secret\n")
    with MockWorker() as worker, Router(tmp_path, worker.url, tenants__keys_file=tmp_path / "keys.toml") as router:
        asking = ("worker", "list", "--router", router.url)
        refused = kvdctl(*asking)
        assert (refused.returncode, "KVD_ROUTER_KEY, or --key-file" in refused.stderr) == (1, True)
        unknown = kvdctl(*asking, KVD_ROUTER_KEY="wrong").stderr
        assert "does not know the API key that was given (give an administrator's key: KVD_ROUTER_KEY" in unknown
        hers = kvdctl(*asking, KVD_ROUTER_KEY="hers")
        assert (hers.returncode, "is for administrators" in hers.stderr) == (1, True)
        assert "give an administrator's key: KVD_ROUTER_KEY" in hers.stderr
        assert kvdctl(*asking, KVD_ROUTER_KEY="secret").returncode == 0
        assert kvdctl(*asking, "--key-file", str(tmp_path / "key"), KVD_ROUTER_KEY="wrong").returncode == 0
        missing = kvdctl(*asking, "--key-file", str(tmp_path / "none"))
        assert (missing.returncode, "cannot read" in missing.stderr) == (1, True)
        (tmp_path / "key").write_text("secret\nof another\n")
        two = kvdctl(*asking, "--key-file", str(tmp_path / "key"))
        assert (two.returncode, "more than one API key" in two.stderr, "secret" in two.stderr) == (1, True, False)


@pytest.mark.parametrize(
    "command", [("top",), ("worker", "list"), ("worker", "add"), ("worker", "drain"), ("worker", "remove")]
)
def test_help_has_examples_and_exit_codes(command: tuple[str, ...]) -> None:
    said = kvdctl(*command, "--help").stdout
    assert f"  kvdctl {' '.join(command)}" in said
    assert "3 no router reachable" in said
    assert "KVD_ROUTER_URL" in said
