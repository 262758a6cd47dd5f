"""The router's own pages: what they say, who may see and change it, and that Prometheus can read the metrics."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from kvd.router.decisions import MOST, MOST_SHOWN, Decisions
from kvd.router.load import Load
from kvd.router.pages import access, metrics, telling
from kvd.router.pages.pages import PAGES
from kvd.router.policies.choice import Candidate, Choice, Matched, Scored
from kvd.router.proxy.strict import Malformed, read
from kvd.router.tenants import ANYBODY, Tenant, digest
from kvd.router.work import Request, Work
from tests.harness import eventually
from tests.router_harness import MockWorker, Router, Served, ToldRouter, post
from tests.told_router import A, B, C, Row

# -- over HTTP --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> Iterator[ToldRouter]:
    with ToldRouter() as running:
        yield running


@pytest.fixture(scope="module")
def worker() -> Iterator[MockWorker]:
    with MockWorker() as running:
        yield running


@pytest.fixture(scope="module")
def router(worker: MockWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """A plain one, by load."""
    with Router(tmp_path_factory.mktemp("router"), worker.url) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(worker: MockWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """One with a tenant, `alice`, and an administrator, `root`: their keys are their names."""
    folder = tmp_path_factory.mktemp("keyed")
    lines = []
    for name in ("alice", "root"):
        lines += [f"[{name}]", f'sha256 = ["{digest(name.encode()).hex()}"]', "shared = true"]
    (folder / "keys.toml").write_text("\n".join([*lines, "admin = true"]))
    with Router(folder, worker.url, tenants__keys_file=folder / "keys.toml") as running:
        yield running


def asked(at: Served, path: str, *headers: str, body: object = None, method: str = "GET") -> Any:
    """(status, the answer's JSON, or its text)."""
    head = [f"{method} {path} HTTP/1.1", "host: x", "connection: close", *headers]
    sent = "\r\n".join([*head, "", ""]).encode() if body is None else post(path, body, "connection: close", *headers)
    reply = at.talk(sent)
    head_part, _, text = reply.partition(b"\r\n\r\n")
    try:
        return int(head_part.split()[1]), json.loads(text)
    except ValueError:
        return int(head_part.split()[1]), text.decode()


def test_a_router_by_load_answers_every_page(router: Router, worker: MockWorker) -> None:
    assert asked(router, "/kvd/decisions")[0] == 200
    status, said = asked(router, "/kvd/decisions?request=x")
    assert (status, said["decisions"], said["total"]) == (200, [], 0)
    status, said = asked(router, "/kvd/workers")
    assert (status, said["policy"], said["processes"], said["pid"]) == (200, "kvd", 1, router.process.pid)
    (only,) = said["workers"]
    assert (only["name"], only["state"], only["origin"], only["credit"]) == (
        worker.url,
        "serving",
        "configured",
        False,
    )
    assert only["why"]
    status, said = asked(router, "/kvd/ledger")
    assert (status, said["available"], said["lost"]["lag"]) == (200, 0, 0)
    status, said = asked(router, "/kvd/workers/add", body={"worker": "ftp://a"})
    assert (status, said["error"]["hint"]) == (409, "for instance http://127.0.0.1:30000")


def test_what_a_worker_has_of_ours_is_shown(router: Router, worker: MockWorker) -> None:
    worker.set(hold=True)
    with router.connect() as sock:
        sock.sendall(post("/generate", {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 1}}))
        eventually(lambda: asked(router, "/kvd/workers")[1]["workers"][0]["queued"] == 1, 10, "it waits for its token")
        worker.step()
    worker.set(hold=False)


def test_a_decision_has_its_candidates_terms_and_outcome(told: ToldRouter) -> None:
    _, said = asked(told, "/kvd/decisions?request=answered")
    (made,) = said["decisions"]
    assert (made["worker"], made["tokens"], made["cached_tokens"], made["outcome"]) == (A, 4096, 3584, "answered")
    assert made["actual_ttft_s"] == pytest.approx(0.25)
    assert made["took_s"] == pytest.approx(3.0)
    assert made["why"].startswith(f"{A} costs ")
    first = made["ranked"][0]
    assert first["worker"] == A
    assert first["matched"] == {"gpu": 3584, "ram": 3840, "nvme": 0, "shared": 0, "expected": 0}
    assert (first["running"], first["queued"], first["queued_tokens"]) == (3, 1, 2048)
    assert sum(first["terms"].values()) == pytest.approx(first["cost"])
    assert first["ttft_s"] == made["predicted_ttft_s"]
    assert [each["cost"] for each in made["ranked"]] == sorted(each["cost"] for each in made["ranked"])


def test_the_last_decisions_are_listed_and_a_request_that_was_sent_twice_has_two(told: ToldRouter) -> None:
    _, said = asked(told, "/kvd/decisions?last=3")
    assert [made["request"] for made in said["decisions"]] == ["open", "answered", "twice"]
    assert (said["total"], said["kept"]) == (6, 6)
    _, said = asked(told, "/kvd/decisions?request=twice")
    assert [made["outcome"] for made in said["decisions"]] == ["", "unreachable"]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/kvd/decisions?last=x", 400),
        ("/kvd/decisions?last=-1", 400),
        ("/kvd/decisions?first=1", 400),
        ("/kvd/decisions?last=1&last=2", 400),
        ("/kvd/workers?last=1", 400),
        ("/kvd/nothing", 404),
        ("/kvd/", 404),
        ("/kvd/workers/add", 405),
        ("/kvd/health?whatever=1", 200),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_words(told: ToldRouter, target: str, status: int) -> None:
    found, said = asked(told, target)
    assert found == status
    assert status == 200 or said["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"worker": 5}', b'{"worker": "http://a:1", "weight": 1}', b"{" * 9]
)
def test_a_change_that_is_not_understood_changes_nothing(told: ToldRouter, body: bytes) -> None:
    status, said = asked(told, "/kvd/workers/remove", body=body)
    assert (status, "http://HOST:PORT" in said["error"]["message"]) == (400, True)
    assert len(asked(told, "/kvd/workers")[1]["workers"]) == 3


def test_workers_come_and_go_by_post() -> None:
    with ToldRouter() as told:

        def change(what: str, worker: str, query: str = "") -> tuple[int, Any]:
            status, said = asked(told, f"/kvd/workers/{what}{query}", body={"worker": worker})
            return status, said

        def states() -> dict[str, str]:
            return {one["name"]: one["state"] for one in asked(told, "/kvd/workers")[1]["workers"]}

        pid = asked(told, "/kvd/workers")[1]["pid"]
        assert change("add", "http://10.0.0.4:30000", f"?pid={pid}")[0] == 200
        assert change("drain", A)[1]["done"] == "draining"
        assert change("remove", B)[0] == 200
        assert states() == {A: "draining", C: "serving", "http://10.0.0.4:30000": "joining"}
        status, said = change("remove", B)
        assert (status, said["error"]["message"]) == (409, f"there is no worker {B}")
        assert A in said["error"]["hint"]
        assert change("add", "http://10.0.0.5:30000", "?pid=1")[0] == 421
        assert change("add", "ftp://x")[0] == 409
        assert len(states()) == 3


def test_who_may_see_what_where_keys_are_set(keyed: Router) -> None:
    for path, page in PAGES.items():
        body = {"worker": "ftp://a"} if page.method == "POST" else None
        stranger, _ = asked(keyed, path, body=body)
        tenant, _ = asked(keyed, path, "authorization: Bearer alice", body=body)
        administrator, _ = asked(keyed, path, "x-api-key: root", body=body)
        assert (stranger, tenant) == ((200, 200) if page.everybodys else (401, 403)), path
        assert administrator == (409 if body else 200), path
    assert asked(keyed, "/kvd/anything")[0] == 401


def test_a_large_change_is_refused_before_it_comes(told: ToldRouter) -> None:
    reply = told.talk(b"POST /kvd/workers/add HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 413 ")
    chunked = b"POST /kvd/workers/add HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert told.talk(chunked).startswith(b"HTTP/1.1 413 ")


# -- who may ------------------------------------------------------------------------------------------------


def refused(peer: str, *fields: str, tenant: Tenant | None = ANYBODY, keys: bool = False, changes: bool = True) -> int:
    head = read("\r\n".join(["POST /kvd/workers/add HTTP/1.1", "host: x", *fields, "", ""]).encode())
    try:
        access.admit(head, tenant, keys, peer, changes)
    except Malformed as wrong:
        return wrong.status
    return 0


def test_without_keys_only_who_is_on_the_machine_changes_workers() -> None:
    assert [refused(peer) for peer in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")] == [0, 0, 0, 0]
    assert [refused(peer) for peer in ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "", "localhost")] == [403] * 5
    assert refused("10.0.0.1", changes=False) == 0


def test_nor_through_a_proxy_or_a_page_in_a_browser() -> None:
    for field in (
        "X-Forwarded-For: 127.0.0.1",
        "Via: 1.1 a",
        "Forwarded: for=x",
        "Origin: http://evil",
        "X-Real-IP: ::1",
    ):
        assert refused("127.0.0.1", field) == 403
    administrator = Tenant("root", admin=True)
    assert refused("10.0.0.1", "Via: 1.1 a", tenant=administrator, keys=True) == 0
    assert refused("127.0.0.1", tenant=Tenant("alice"), keys=True) == 403
    assert refused("127.0.0.1", tenant=None, keys=True) == 401


# -- what is told -------------------------------------------------------------------------------------------


def decided(count: int, candidates: int = 2) -> Decisions:
    decisions = Decisions()
    for n in range(count):
        ranked = tuple(
            Scored(Candidate(f"w{(n + k) % candidates}", Matched(), Load()), float(k), {"t": 1.0}, 0.5)
            for k in range(candidates)
        )
        decisions.add(Request(f"r{n}", 100, (), 64), Choice("kvd", ranked), float(n))
    return decisions


def test_what_is_listed_is_bounded_and_what_is_left_out_is_counted() -> None:
    decisions = decided(300, candidates=40)
    shown = telling.listed(decisions, 10**6, 300.0)
    assert len(shown) == telling.MOST_LISTED
    assert {(len(made.ranked), made.candidates) for made in shown} == {(telling.MOST_SHOWN, 40)}
    (made,) = telling.of_request(decisions, "r7", 300.0)
    assert (len(made.ranked), made.candidates, made.age_s) == (MOST_SHOWN, 40, 293.0)
    assert telling.of_request(decisions, "r300", 300.0) == []


def test_recent_figures_are_of_a_minute_and_of_what_is_known() -> None:
    decisions = decided(100)
    made = decisions.find("r98")
    assert made is not None
    made.first_at, made.ended_at, made.cached = 98.75, 99.0, 64
    found = telling.recent(decisions, 99.0)
    assert (found["w0"].requests, found["w1"].requests) == (30, 31)  # of 39 to 99
    lately = found["w0"]
    assert (lately.counted, lately.tokens, lately.cached_tokens) == (1, 100, 64)
    assert (lately.timed, lately.predicted_ttft_s, lately.actual_ttft_s, lately.within_s) == (1, 0.5, 0.75, 60.0)
    assert telling.recent(Decisions(), 1.0) == {}


def test_recent_figures_of_a_busy_router_are_of_what_it_still_remembers() -> None:
    decisions = Decisions()
    choice = Choice("kvd", (Scored(Candidate("w", Matched(), Load()), 1.0, {}),))
    for n in range(3 * MOST):
        decisions.add(Request(f"r{n}", 1, (), 64), choice, n / 100)
    now = (3 * MOST - 1) / 100
    found = telling.recent(decisions, now)["w"]
    assert found.requests == MOST
    assert found.within_s == pytest.approx((MOST - 1) / 100)


def test_workers_are_told_by_name_with_their_load() -> None:
    loads = {"b": Load(Work(2, 100, 1.0), running=3)}
    first, second = telling.workers(
        [Row("b"), Row("a", state="joining")], lambda name: loads.get(name, Load()), {"a": 4}, {}
    )
    assert (first.name, first.state, first.connections, first.running) == ("a", "joining", 4, 0)
    assert (second.name, second.running, second.queued, second.queued_tokens) == ("b", 3, 2, 100)


def test_the_ledger_in_percent() -> None:
    assert telling.percentages(2000, 1000, 900, {"lag": 100, "gate": 0}) == {
        "available": 50.0, "achieved": 90.0, "lost_to_lag": 10.0, "lost_to_gate": 0.0,
    }  # fmt: skip
    assert set(telling.percentages(0, 0, 0, {"lag": 0}).values()) == {0.0}


# -- metrics ------------------------------------------------------------------------------------------------

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\n"])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (NaN|[+-]Inf|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


def parsed(text: str) -> dict[str, float]:
    """By the grammar of Prometheus' text format 0.0.4; also that each family is in one piece, described and new."""
    samples: dict[str, float] = {}
    types: dict[str, str] = {}
    helped: set[str] = set()
    family = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if described := re.fullmatch(rf"# (HELP|TYPE) ({NAME}) (.+)", line):
            kind, family, rest = described.groups()
            assert family not in (types if kind == "TYPE" else helped), f"{family} a second time"
            if kind == "HELP":
                helped.add(family)
            else:
                assert rest in ("counter", "gauge")
                types[family] = rest
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, f"no sample: {line}"
        assert sample[1] == family, f"{line} is not with its family"
        assert types[family] == ("counter" if family.endswith("_total") else "gauge")
        name = line.rpartition(" ")[0]
        assert name not in samples, f"{name} twice"
        samples[name] = float(sample[3])
    assert not set(types) - helped, f"nobody knows what these are: {set(types) - helped}"
    return samples


@pytest.mark.parametrize("which", ["router", "told"])
def test_prometheus_can_read_the_metrics_and_people_what_they_mean(which: str, request: pytest.FixtureRequest) -> None:
    at: Served = request.getfixturevalue(which)
    asked(at, "/generate", body={"text": "a"})
    asked(at, "/v1/models")
    reply = at.talk(b"GET /kvd/metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    head, _, text = reply.partition(b"\r\n\r\n")
    assert b"content-type: text/plain; version=0.0.4" in head
    samples = parsed(text.decode())
    if which == "told":
        assert samples[f'kvd_router_worker_credit{{worker="{C}"}}'] == 0
        assert samples[f'kvd_router_worker_state{{worker="{A}",state="serving"}}'] == 1
        assert samples['kvd_router_ledger_lost_tokens_total{cause="routing"}'] == 10 * (2048 - 512)
        assert samples["kvd_router_decisions_total"] == 6


def test_metrics_of_hostile_names_and_large_numbers_stay_readable() -> None:
    name = metrics.named("worker_credit", worker='a"\n\\{} b')
    text = metrics.exposition({"clients": 1, name: 0.5, "requests_total": 123456789, "bodies_bytes": float("inf")})
    assert parsed(text) == {
        "kvd_router_clients": 1.0,
        'kvd_router_worker_credit{worker="a\\"\\n\\\\{} b"}': 0.5,
        "kvd_router_requests_total": 123456789.0,
        "kvd_router_bodies_bytes": float("inf"),
    }
    assert "123456789\n" in text


def test_a_familys_samples_are_together_whatever_their_order() -> None:
    assert parsed(metrics.exposition({"worker_queued": 1, "clients": 2, 'worker_queued{worker="a"}': 3}))
