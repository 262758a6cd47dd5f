"""`kvdctl simulate`: published hit rates come out again, and the daemon's policy keeps what it promises on them."""

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kvd.ctl.simulate.cache import FLAT, NAMES, Chains, hit_rate
from kvd.ctl.simulate.plot import page
from kvd.ctl.simulate.reference import Lru, belady
from kvd.ctl.simulate.traces import Request, read
from kvd.errors import KvdError
from tests.kvdctl import kvdctl

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRACES = {
    "conversation": "mooncake/conversation_trace.jsonl",
    "toolagent_like": "mooncake/toolagent_like.jsonl.gz",
    "weka": "agentic/weka_agent_dev_b512.jsonl.gz",
}
SIZES = (1000, 5000, 10_000, 50_000)
PUBLISHED = {
    ("conversation", "lru"): (0.045, 0.110, 0.211, 0.355),
    ("conversation", "opt"): (0.191, 0.341, 0.366, 0.366),
    ("toolagent_like", "lru"): (0.335, 0.370, 0.429, 0.519),
    ("toolagent_like", "opt"): (0.426, 0.516, 0.528, 0.528),
    ("weka", "lru"): (0.120, 0.811, 0.948, 0.952),
    ("weka", "opt"): (0.492, 0.901, 0.952, 0.952),
}


@cache
def trace(name: str) -> list[Request]:
    path = DATA / TRACES[name]
    if not path.exists():
        pytest.skip(f"needs the trace {TRACES[name]} in the shared data folder")
    return read(path)


def few(*requests: list[int]) -> list[Request]:
    return [Request(float(at), blocks) for at, blocks in enumerate(requests)]


# -- policies on small traces -----------------------------------------------------------------------------


def test_lru_and_belady_by_hand() -> None:
    lru = Lru(2)
    assert [lru.ask(block) for block in (1, 2, 1, 3, 2, 1)] == [False, False, True, False, False, False]
    assert belady([1, 2, 1, 3, 2, 1], 2) == 3  # 3 never comes back: it is not taken in


@pytest.mark.parametrize("policy", NAMES)
def test_a_tier_that_holds_everything_hits_all_but_first_uses(policy: str) -> None:
    requests = few([1, 2, 3], [1, 2, 4], [1, 2, 3], [9])
    assert hit_rate(policy, requests, 1000) == pytest.approx(5 / 10)


@pytest.mark.parametrize("policy", NAMES)
def test_no_policy_beats_belady(policy: str) -> None:
    requests = few(*([block, block + 1] for block in (1, 5, 1, 9, 5, 1, 20, 9, 1, 5) * 5))
    assert hit_rate(policy, requests, 4) <= hit_rate("opt", requests, 4)


@pytest.mark.parametrize("name", FLAT)
def test_references_live_with_the_smallest_tiers(name: str) -> None:
    for capacity in (1, 2, 3):
        policy = FLAT[name](capacity)
        for block in (1, 2, 3, 1, 1, 4, 2, 2, 5, 1, 3, 3) * 20:
            policy.ask(block)


def test_a_page_stays_as_long_as_a_page_below_it() -> None:
    chains = Chains(5)
    for at in range(200):
        chain = [at % 7, 100 + at % 7, 200 + at % 7, 300 + at % 5]
        chains.replay(Request(float(at), chain))
        chains.policy.check()
        chains.check()


# -- real traces ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "opt"])
@pytest.mark.parametrize("name", TRACES)
def test_published_hit_rates_come_out_again(name: str, policy: str) -> None:
    rates = [hit_rate(policy, trace(name), size) for size in SIZES]
    # Three digits; conversation under LRU at 1,000 is 0.04447 here, whatever the size between 999 and 1,024.
    assert rates == pytest.approx(PUBLISHED[name, policy], abs=0.00055)


@pytest.mark.slow
def test_the_policy_never_loses_to_lru_and_gains_where_room_is_short() -> None:
    scores = []
    for name in TRACES:
        for size, lru, opt in zip(SIZES, PUBLISHED[name, "lru"], PUBLISHED[name, "opt"], strict=True):
            rate = hit_rate("kvd", trace(name), size)
            assert rate >= lru - 0.005, f"{name} at {size}"
            if size <= 5000:
                scores.append((rate - lru) / (opt - lru))
    assert sum(scores) / len(scores) >= 0.15


# -- reading traces ---------------------------------------------------------------------------------------


def test_traces_are_read_in_file_order_plain_and_gzipped(tmp_path: Path) -> None:
    lines = '{"timestamp": 3000, "hash_ids": [1, 2], "input_length": 9}\n\n{"timestamp": 3000, "hash_ids": []}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as packed:
        packed.write(lines)
    wanted = [Request(3.0, [1, 2]), Request(3.0, [])]
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.jsonl.gz") == wanted


def _broken(path: Path) -> None:
    path.write_text('{"timestamp": 1, "hash_ids": [1]}\n{"timestamp": 1}\n')


def _empty(path: Path) -> None:
    path.write_text("")


def _not_gzip(path: Path) -> None:
    path.with_suffix(".gz").write_text("plain")


@pytest.mark.parametrize(
    ("make", "name", "says"),
    [(_broken, "t.jsonl", "line 2"), (_empty, "t.jsonl", "no blocks"), (_not_gzip, "t.gz", "cannot read")],
)
def test_what_is_wrong_with_a_trace_is_said(
    tmp_path: Path, make: Callable[[Path], None], name: str, says: str
) -> None:
    make(tmp_path / "t.jsonl")
    with pytest.raises(KvdError, match=says):
        read(tmp_path / name)


# -- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl"
    requests = [{"timestamp": 1000 * at, "hash_ids": [0, at % 5 + 1]} for at in range(50)]
    path.write_text("\n".join(json.dumps(request) for request in requests))
    return path


def test_json_names_policies_and_capacities(small: Path) -> None:
    ran = kvdctl("simulate", "cache", "--trace", str(small), "--capacity", "2,10", "--policy", "lru,opt,kvd", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert list(found) == ["lru", "opt", "kvd"]
    assert found["lru"] == {"2": 0.49, "10": 0.94}
    assert found["opt"]["2"] >= found["kvd"]["2"] >= 0.49


def test_the_table_and_the_plot(small: Path, tmp_path: Path) -> None:
    plot = tmp_path / "rates.html"
    ran = kvdctl("simulate", "cache", "--trace", str(small), "--capacity", "10", "--plot", str(plot))
    assert ran.returncode == 0, ran.stderr
    assert "lru" in ran.stdout
    assert "0.9400" in ran.stdout
    assert "<svg" in plot.read_text()


def test_a_plot_shows_every_policy_and_escapes_its_title() -> None:
    shown = page({"kvd": {10: 0.5, 20: 0.6}, "lru": {10: 0.4, 20: 0.6}}, "<b>")
    assert shown.count("<polyline") == 2
    assert "&lt;b&gt;" in shown


@pytest.mark.parametrize("wrong", [("--capacity", "0"), ("--capacity", "1k"), ("--policy", "magic")])
def test_wrong_usage_exits_2(small: Path, wrong: tuple[str, str]) -> None:
    assert kvdctl("simulate", "cache", "--trace", str(small), *wrong).returncode == 2


def test_an_unreadable_trace_exits_1_with_a_hint(tmp_path: Path) -> None:
    ran = kvdctl("simulate", "cache", "--trace", str(tmp_path / "none.jsonl"), "--json")
    assert ran.returncode == 1
    assert json.loads(ran.stderr)["hint"]


def test_a_plot_of_another_kind_exits_1(small: Path, tmp_path: Path) -> None:
    ran = kvdctl("simulate", "cache", "--trace", str(small), "--capacity", "2", "--plot", str(tmp_path / "x.gif"))
    assert ran.returncode == 1
    assert ".html or .png" in ran.stderr
