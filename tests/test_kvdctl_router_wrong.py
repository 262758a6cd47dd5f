"""kvdctl where a router is not there, is none, lies, refuses, or names things oddly."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvd.ctl.router.link import RouterLink
from kvd.errors import DeadlineMissed, KvdError, PeerError, Refused
from kvd.router.pages import replies
from kvd.router.tenants import digest
from tests.kvdctl import kvdctl
from tests.router_harness import MockWorker, Router, free_port
from tests.told_router import A

NEW = "http://10.0.0.4:30000"


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
