"""What the fleet concludes from what it is told: which worker is whose, what a load means, who is well. No I/O."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from kvd import sglang_info, wire
from kvd.daemon.discovery import identity
from kvd.daemon.holdings import attached
from kvd.daemon.sessions import Session
from kvd.errors import PeerError
from kvd.places import replay_endpoint
from kvd.router.fleet.health import MISSES, Health
from kvd.router.fleet.linking import Link, Stated, links, seen_from_here
from kvd.router.fleet.loads import MOST_AGE_S, report
from kvd.router.fleet.members import state_of
from kvd.router.fleet.told import Told
from kvd.router.matching import Member
from kvd.sidecar import engine

HERE, ONE, OTHER = "http://127.0.0.1:1", "http://a:1", "http://b:1"
PAGES = wire.Source(namespace="00", pool="kv", block_tokens=16, workers=(HERE,))


def source(life: str, worker: str = HERE, tokens: int = 16) -> wire.Source:
    return wire.Source(worker, 0, block_tokens=tokens, life=life)


def test_a_worker_is_linked_by_what_it_states_whatever_its_url_is() -> None:
    nodes = {"tcp://n:1": [source("x"), PAGES], "tcp://m:1": [source("y"), PAGES]}
    found = links({ONE: Stated("y", 16), OTHER: Stated("x", 16)}, nodes)
    assert found[ONE] == Link(Member("tcp://m:1", HERE, 16, frozenset({"00"})))
    assert found[OTHER] == Link(Member("tcp://n:1", HERE, 16, frozenset({"00"})))


@pytest.mark.parametrize(
    ("stated", "sources", "why"),
    [
        ({ONE: Stated("", 16)}, [source("")], "nothing that tells it from others"),
        ({ONE: Stated("x", 16), OTHER: Stated("x", 16)}, [source("x")], "another worker states the same"),
        ({ONE: Stated("x", 16)}, [source("y"), PAGES], "no node tells of its blocks"),
        ({ONE: Stated("x", 16)}, [source("x", tokens=64)], "its node takes its blocks for 64 tokens, not 16"),
        ({ONE: Stated("x", 16)}, [replace(source("x"), strange=True)], "name blocks otherwise"),
    ],
)
def test_what_is_not_certain_is_not_linked_and_says_why(stated: dict[str, Stated], sources: Any, why: str) -> None:
    for link in links(stated, {"n": sources}).values():
        assert link.member is None
        assert why in link.why


def test_who_started_anew_is_not_sent_to_name_what_is_named_already() -> None:
    node = "tcp://10.0.0.1:5600"
    found = links({"http://10.0.0.1:1": Stated("new", 16), ONE: Stated("other", 16)}, {node: [source("old")]})
    assert found["http://10.0.0.1:1"].why == "its node knows another start of it"
    assert node in found["http://10.0.0.1:1"].remedy
    assert found[ONE].why == "no node tells of its blocks"


def test_one_rank_that_names_blocks_otherwise_is_enough() -> None:
    ranks = [source("x"), replace(source("x"), rank=1, strange=True), replace(source("x"), rank=2)]
    assert "name blocks otherwise" in links({ONE: Stated("x", 16)}, {"n": ranks})[ONE].why
    assert links({ONE: Stated("x", 16)}, {"n": ranks[:1], "m": ranks[1:]})[ONE].member == Member("n", HERE, 16)


def test_names_that_depend_on_what_is_not_told_are_nobodys_fault() -> None:
    strange = {"n": [replace(source("x"), strange=True)]}
    assert links({ONE: Stated("x", 16, "dynamo")}, strange)[ONE].member == Member("n", HERE, 16, frozenset())


def test_namespaces_count_for_those_who_are_attached_with_them_and_need_no_more() -> None:
    def namespaces(*pages: wire.Source) -> frozenset[str]:
        member = links({ONE: Stated("x", 16)}, {"n": [source("x"), *pages]})[ONE].member
        assert member is not None
        return member.namespaces

    other = wire.Source(namespace="01", pool="kv", block_tokens=16, workers=("http://127.0.0.1:2",))
    wider = wire.Source(namespace="02", pool="kv", block_tokens=64, workers=(HERE,))
    flat = wire.Source(namespace="03", pool="kv", block_tokens=16, workers=("http://z:1", HERE))
    side = wire.Source(namespace="04", pool="mamba", block_tokens=16, workers=(HERE,))
    assert namespaces(PAGES, other, wider, flat) == {"00", "03"}
    assert namespaces(PAGES, side) == frozenset(), "a hit needs its state too"


@pytest.mark.parametrize(
    ("url", "node", "here"),
    [
        (HERE, "tcp://10.0.0.5:5600", "http://10.0.0.5:1"),
        ("http://localhost:30000", "tcp://[fd00::5]:5600", "http://[fd00::5]:30000"),
        ("http://10.0.0.7:30000/", "tcp://10.0.0.5:5600", "http://10.0.0.7:30000"),
        (HERE, "ipc:///run/kvd/events", HERE),
        (HERE, "tcp://localhost:5600", HERE),
        ("http://worker", "ipc:///x", "http://worker:80"),
        ("https://a:1", "ipc:///x", None), ("http://a:1/path", "ipc:///x", None), ("http://u@a:1", "ipc:///x", None),
        ("http://a:99999", "ipc:///x", None), ("http://[::1", "ipc:///x", None),
        ("http://a\u00e9 b:1", "ipc:///x", None),
        ("http://", "ipc:///x", None), ("", "ipc:///x", None), ("http://a:1\r\nx: y", "ipc:///x", None),
        ("http://a..b:1", "ipc:///x", None), ("http://a:0", "ipc:///x", None), ("http://A:1", "ipc:///x", "http://a:1"),
        (HERE, "tcp://a\"b:5600", None),
    ],
)  # fmt: skip
def test_a_nodes_own_addresses_are_the_nodes_as_seen_from_here(url: str, node: str, here: str | None) -> None:
    assert seen_from_here(url, node) == here


def test_a_life_is_another_one_after_every_start_and_the_same_for_everybody_who_asks() -> None:
    info = {
        "port": 30000,
        "random_seed": 7,
        "internal_states": [{"startup_time": {"a": 1.5}}, {"startup_time": {"b": 2}}],
    }
    life = sglang_info.life(info)
    assert len(life) == 32
    assert sglang_info.life({**info, "startup_time": {"tokenizer_e2e": 3.5}, "version": "x"}) == life
    assert sglang_info.life({**info, "internal_states": info["internal_states"][::-1]}) == life  # type: ignore[index]
    others = [
        {"port": 1},
        {"random_seed": 8},
        {"internal_states": [{"startup_time": {"a": 1.6}}]},
        {"internal_states": None},
    ]
    assert len({life, *(sglang_info.life({**info, **other}) for other in others)}) == 5
    for nothing in (
        {},
        [],
        None,
        {"internal_states": 5},
        {"internal_states": [5, {}]},
        {"port": "x", "random_seed": 1},
    ):
        assert sglang_info.life(nothing) == ""
    assert identity(json.dumps(info).encode()) == ("30000-7", life)
    assert identity(b"{") == identity(b"[" * 100_000) == ("", "")


def test_a_rank_knows_the_server_that_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.server() == "", "there is no SGLang here"
    monkeypatch.setattr(engine, "server_args", lambda: SimpleNamespace(port=30000, random_seed=7))
    assert engine.server() == "30000-7"
    monkeypatch.setattr(engine, "_serving", lambda: SimpleNamespace(port=30001))
    monkeypatch.setattr(engine, "_device", lambda: SimpleNamespace(random_seed=8))
    assert engine.server() == "30001-8", "what was resolved goes first"
    monkeypatch.setattr(engine, "_device", lambda: SimpleNamespace())
    assert engine.server() == "30000-7", "not published there"


def test_sessions_are_of_the_worker_whose_server_they_name_unless_two_have_that_name() -> None:
    spec = wire.NamespaceSpec(bytes(16), 4096, 16, 0, 1, "kv", "m")

    def session(server: str) -> Session:
        return Session(1, b"", 1, "worker", "", 0.0, None, [spec], server)

    names = {"http://a:1": "1-5", "http://a:2": "2-6", "http://b:1": "3-7", "http://c:1": "3-7", "http://d:1": ""}
    found = attached(names, [session("1-5"), session("2-6"), session("3-7"), session("9-9")])
    assert found == {bytes(16): ("http://a:1", "http://a:2")}
    assert attached(names | {"http://e:1": ""}, [session("")]) == {}


def test_what_sglang_says_of_itself_is_read() -> None:
    info = {
        "model_path": "/m", "served_model_name": "m", "tokenizer_path": "/t", "revision": "main", "page_size": 1,
        "kv_events": {"block_size": 64}, "kv_events_config": '{"publisher": "zmq", "format": "dynamo"}',
        "chunked_prefill_size": -1, "max_total_num_tokens": 1024, "tp_size": 2, "lora_paths": ["poet=/p"],
        "internal_states": [{"memory_usage": {"kvcache": 0.5, "token_capacity": 1024}}], "random_seed": 3, "port": 1,
    }  # fmt: skip
    told = Told.of(json.dumps(info).encode())
    assert (told.tokenizer_path, told.revision, told.block_tokens, told.format) == ("/t", "main", 64, "dynamo")
    assert (told.chunk_tokens, told.most_tokens, told.token_bytes) == (8192, 1024, 2 * (1 << 29) // 1024)
    assert told.names() == {"m", "/m", "m:poet", "/m:poet"}
    assert set(told.scheme.adapters) == {"poet"}
    assert told.no_blocks == ""
    for changed, why in (
        ({"speculative_algorithm": "EAGLE"}, "pairs"), ({"disable_radix_cache": True}, "no prefixes"),
        ({"kv_events": None}, "--kv-events-config"),
    ):  # fmt: skip
        assert why in Told.of(json.dumps(info | changed).encode()).no_blocks


@pytest.mark.parametrize(
    "info",
    [
        None, [], 5, {}, {"model_path": 5}, {"model_path": "/m", "kv_events": [1]},
        {"model_path": "/m", "kv_events": "x"}, {"model_path": "/m", "kv_events_config": "{"},
        {"model_path": "/m", "kv_events_config": "[]"},
        {"model_path": "/m", "lora_paths": [[1, {}]], "default_chat_template_kwargs": 5},
        {"model_path": "/m", "lora_paths": [f"a{n}=/p" for n in range(5000)]}, {"model_path": "moss" * 100_000},
        {"model_path": "/m", "tokenizer_path": "/t" * 5000}, {"model_path": "/m", "served_model_name": "m" * 5000},
    ],
)  # fmt: skip
def test_what_is_no_server_info_is_refused(info: Any) -> None:
    with pytest.raises(PeerError, match="not understood"):
        Told.of(json.dumps(info).encode())


def test_figures_that_no_float_can_be_are_not_taken() -> None:
    beyond = 10**400
    with pytest.raises(PeerError, match="not understood"):
        report(json.dumps({"loads": [{"num_waiting_uncached_tokens": beyond}]}).encode(), 5.0)
    memory = {"memory_usage": {"kvcache": -1.5, "token_capacity": 1024}}
    info = {"model_path": "/m", "chunked_prefill_size": beyond, "page_size": beyond, "internal_states": [memory]}
    told = Told.of(json.dumps(info | {"max_total_num_tokens": beyond}).encode())
    assert (told.chunk_tokens, told.block_tokens, told.most_tokens, told.token_bytes) == (8192, 1, 0, 0)


def test_a_load_without_times_is_as_of_now_and_one_of_long_ago_is_old() -> None:
    load = {"num_running_reqs": 1, "num_waiting_reqs": -5, "num_waiting_uncached_tokens": 0}
    assert report(json.dumps({"loads": [load]}).encode(), 5.0) == (5.0, 1, 0, 0, 0, 0)
    at = "2026-01-01T00:00:00+00:00"
    old = report(json.dumps({"loads": [load | {"timestamp": 1.0}], "timestamp": at}).encode(), 5.0)
    assert old.made_at == 5.0 - MOST_AGE_S
    ahead = report(json.dumps({"loads": [load | {"timestamp": 9e9}], "timestamp": at}).encode(), 5.0)
    assert ahead.made_at == 5.0, "its clocks differ: not from the future"


def test_health_counts_what_a_worker_does_and_health_alone_makes_it_well_again() -> None:
    health = Health()
    for _ in range(MISSES - 1):
        health.missed("late")
    assert (health.why, health.in_doubt) == ("", True)
    health.answered()
    for _ in range(MISSES):
        health.missed("late")
    assert health.why == "late"
    health.answered()
    assert (health.why, health.in_doubt) == ("late", False)
    for status, well in (
        (404, False),
        (200, True),
        (401, False),
        (200, True),
        (500, False),
        (503, False),
        (200, True),
    ):
        health.health(status)
        assert (not health.why) is well, "something else may listen there"
        assert well or f"/health says {status}" in health.why
    health.no_health("refused")
    assert (health.why, health.in_doubt) == ("refused", True)


@pytest.mark.parametrize(
    ("draining", "asked", "well", "state"),
    [
        (False, False, True, "joining"), (False, True, True, "serving"), (False, True, False, "unhealthy"),
        (False, False, False, "unhealthy"), (True, True, False, "draining"), (True, False, True, "draining"),
    ],
)  # fmt: skip
def test_states(draining: bool, asked: bool, well: bool, state: str) -> None:
    assert state_of(draining, asked, well) == state


def test_where_a_node_answers_follows_from_where_it_publishes() -> None:
    assert replay_endpoint("tcp://10.0.0.5:5600") == "tcp://10.0.0.5:5601"
    assert replay_endpoint("ipc:///run/kvd/events") == "ipc:///run/kvd/events.replay"
