"""The router's own pages: what they say, who may see and change it, and that Prometheus can read the metrics."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from kvd.router.pages import metrics
from kvd.router.pages.pages import PAGES
from kvd.router.tenants import digest
from tests.harness import eventually
from tests.router_harness import MockWorker, Router, Served, ToldRouter, post
from tests.told_router import A, B, C

# -- over HTTP --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> Iterator[ToldRouter]:
    with ToldRouter() as running:
        yield running


@pytest.fixture(scope="module")
def router(mock: MockWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """A plain one, by load."""
    with Router(tmp_path_factory.mktemp("router"), mock.url) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(mock: MockWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """One with a tenant, `alice`, and an administrator, `root`: their keys are their names."""
    folder = tmp_path_factory.mktemp("keyed")
    lines = []
    for name in ("alice", "root"):
        lines += [f"[{name}]", f'sha256 = ["{digest(name.encode()).hex()}"]', "shared = true"]
    (folder / "keys.toml").write_text("\n".join([*lines, "admin = true"]))
    with Router(folder, mock.url, tenants__keys_file=folder / "keys.toml") as running:
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


def test_a_router_by_load_answers_every_page(router: Router, mock: MockWorker) -> None:
    assert asked(router, "/kvd/decisions")[0] == 200
    status, said = asked(router, "/kvd/decisions?request=x")
    assert (status, said["decisions"], said["total"]) == (200, [], 0)
    status, said = asked(router, "/kvd/workers")
    assert (status, said["policy"], said["processes"], said["pid"]) == (200, "kvd", 1, router.process.pid)
    (only,) = said["workers"]
    assert (only["name"], only["state"], only["origin"], only["credit"]) == (
        mock.url,
        "serving",
        "configured",
        False,
    )
    assert only["why"]
    status, said = asked(router, "/kvd/ledger")
    assert (status, said["available"], said["lost"]["lag"]) == (200, 0, 0)
    status, said = asked(router, "/kvd/workers/add", body={"worker": "ftp://a"})
    assert (status, said["error"]["hint"]) == (409, "for instance http://127.0.0.1:30000")


def test_what_a_worker_has_of_ours_is_shown(router: Router, mock: MockWorker) -> None:
    mock.set(hold=True)
    with router.connect() as sock:
        sock.sendall(post("/generate", {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 1}}))
        eventually(lambda: asked(router, "/kvd/workers")[1]["workers"][0]["queued"] == 1, 10, "it waits for its token")
        mock.step()
    mock.set(hold=False)


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
    "body",
    [b"", b"{}", b"[]", b'{"worker": 5}', b'{"worker": "http://a:1", "weight": 1}', b"{" * 9, b'{"worker": "\xff"}'],
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
        assert change("drain", f"{A}/")[1]["done"] == "draining"
        assert change("remove", f"{B}/")[1]["worker"] == B
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
