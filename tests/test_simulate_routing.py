"""`kvdctl simulate routing`: the modelled worker does what SGLang was measured to do, the fleet what it is told."""

import csv
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.ctl.simulate.routing.engine import ENGINES, pairs
from kvd.ctl.simulate.routing.fleet import POLICIES, Fleet
from kvd.ctl.simulate.routing.measure import measure, scale, work_s
from kvd.ctl.simulate.routing.radix import Radix
from kvd.ctl.simulate.routing.spread import Spread
from kvd.ctl.simulate.routing.worker import Job, Worker
from kvd.ctl.simulate.traces import Prompt, block_tokens, prompts
from kvd.errors import KvdError
from tests.kvdctl import kvdctl
from tests.test_simulate import DATA, TRACES

ENGINE = ENGINES["qwen3-32b-h100x4"]
MEASURED = DATA / "reference/aic_silicon_dev.csv"


def job(number: int, chain: Sequence[int], tokens: int, output: int = 2, at: float = 0.0) -> Job:
    return Job(number, at, chain, tokens, output)


def run(worker: Worker, jobs: Sequence[Job]) -> None:
    for each in jobs:
        while worker.until is not None and worker.until <= each.at:
            worker.run(worker.until)
        worker.arrive(each, each.at)
    while worker.until is not None:
        worker.run(worker.until)


def sessions(count: int, turns: int, seed: int = 1) -> list[Prompt]:
    """Conversations that grow: every turn has all blocks of the one before and two more."""
    chance, found = Random(seed), []
    for number in range(count):
        first, at, length = 1000 * number, chance.uniform(0, 60), chance.randrange(4, 20)
        for turn in range(turns):
            blocks = list(range(first, first + length + 2 * turn))
            found.append(Prompt(at, blocks, 512 * len(blocks), 50))
            at += chance.uniform(3, 9)
    return sorted(found, key=lambda prompt: prompt.at)


# -- the worker -------------------------------------------------------------------------------------------


def test_one_prompt_takes_its_prefill_and_its_decode_steps() -> None:
    worker, alone = Worker(ENGINE, 512, Spread()), job(0, range(4), 2048, output=11)
    run(worker, [alone])
    assert alone.first_at == pytest.approx(ENGINE.prefill_s(2048, pairs(0, 2048)))
    step_s = ENGINE.decode_s(1, 2049 + 9 / 2)
    assert alone.ended_at - alone.first_at == pytest.approx(10 * step_s)
    assert (worker.intervals.count, worker.intervals.mean) == (10, pytest.approx(step_s))


def test_a_long_prompt_is_computed_in_chunks_before_anybody_decodes() -> None:
    worker = Worker(ENGINE, 512, Spread())
    short, long = job(0, range(2), 1024, output=100), job(1, range(10, 50), 20_480, at=0.1)
    run(worker, [short, long])
    chunks = (8192, 8192, 4096)
    prefill_s = sum(ENGINE.prefill_s(n, pairs(8192 * at, n)) for at, n in enumerate(chunks))
    began = long.first_at - prefill_s
    assert short.first_at < began < short.first_at + 0.1 + ENGINE.decode_s(1, 1100)
    assert worker.intervals.at(1.0) > prefill_s  # the pause in the short one's answer


def test_a_prefix_that_was_computed_is_found_again_and_shared() -> None:
    worker = Worker(ENGINE, 512, Spread())
    first, second = job(0, range(8), 4096), job(1, [*range(6), 90, 91], 4096, at=5.0)
    run(worker, [first, second])
    assert (first.cached, second.cached) == (0, 6 * 512)
    again = job(2, range(8), 4096, at=10.0)
    run(worker, [again])
    assert again.cached == 4095  # the last token is always computed


def test_siblings_in_one_line_compute_their_prefix_once() -> None:
    worker = Worker(ENGINE, 512, Spread())
    siblings = [job(number, [*range(16), 100 + number], 17 * 512) for number in range(4)]
    run(worker, siblings)
    assert [each.cached for each in siblings] == [0, *[16 * 512] * 3]


def test_a_prompt_waits_until_there_is_room_for_it_and_its_answer() -> None:
    small = type(ENGINE)("small", *[getattr(ENGINE, name) for name in (
        "step_s", "token_s", "pair_s", "idle_s", "sequence_s", "context_s")], kv_tokens=10 * 512)  # fmt: skip
    worker = Worker(small, 512, Spread())
    first, second = job(0, range(8), 4096, output=500), job(1, range(20, 28), 4096)
    run(worker, [first, second])
    assert second.first_at > first.ended_at
    assert worker.free_tokens == 10 * 512


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 30)), min_size=1, max_size=40))
def test_every_prompt_is_answered_and_all_room_comes_back(wanted: list[tuple[int, int, int]]) -> None:
    worker = Worker(ENGINE, 512, Spread())
    worker._radix.capacity = 12
    jobs = [
        job(number, range(100 * which, 100 * which + blocks), 512 * blocks, output, at=number / 20)
        for number, (which, blocks, output) in enumerate(wanted)
    ]
    run(worker, jobs)
    assert all(each.at < each.first_at <= each.ended_at for each in jobs)
    assert all(a.first_at <= b.first_at for a, b in pairwise(jobs))
    assert worker.intervals.count == sum(each.output - 1 for each in jobs)
    assert (worker._radix.claimed, worker.running, worker.context) == (0, 0, 0)
    assert worker._radix.used <= 12


def test_who_is_used_least_recently_leaves_and_leaves_leave_first() -> None:
    radix = Radix(4)

    def use(*chain: int) -> list[int] | None:
        found = radix.match(chain)
        radix.hold(chain, found)
        gone = radix.take(len(chain) - found)
        if gone is not None:
            radix.share(chain, found, len(chain))
            radix.let_go(chain, len(chain))
        else:
            radix.let_go(chain, found)
        return gone

    assert use(1, 2) == []
    assert use(3, 4) == []
    assert use(1, 5) == [2]  # the leaf, not its parent
    assert use(6, 7) == [4, 3]
    assert use(1, 2, 3, 4, 5) is None  # more than there is
    assert radix.match([1, 5]) == 2


@pytest.mark.skipif(not MEASURED.exists(), reason="needs the reference measurements in the shared data folder")
def test_the_modelled_worker_repeats_what_sglang_was_measured_to_do() -> None:
    errors = []
    for row in csv.DictReader(MEASURED.read_text().splitlines()):
        run_of = (row["model_path"], row["system"], row["backend"], row["tp_size"])
        if run_of != ("Qwen/Qwen3-32B", "h100_sxm", "sglang", "4"):
            continue
        tokens, output, count = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
        blocks = tokens // 64
        jobs = [job(at, range(at * blocks, (at + 1) * blocks), tokens, output) for at in range(count)]
        run(Worker(ENGINE, 64, Spread()), jobs)
        ttft_s = sum(each.first_at for each in jobs) / count
        interval_s = sum((each.ended_at - each.first_at) / (output - 1) for each in jobs) / count
        errors.append(abs(1000 * ttft_s / float(row["silicon_ttft_ms"]) - 1))
        errors.append(abs(1000 * interval_s / float(row["silicon_tpot_ms"]) - 1))
    assert len(errors) == 24
    assert sum(errors) / 24 < 0.06
    assert max(errors) < 0.22


def test_percentiles_are_right_to_a_per_cent() -> None:
    spread, chance = Spread(), Random(5)
    values = sorted(chance.lognormvariate(-3, 1) for _ in range(5000))
    for value in values:
        spread.add(value)
    spread.add(1.0, 0)
    assert spread.mean == pytest.approx(sum(values) / 5000)
    for part in (0.5, 0.9, 0.99):
        assert spread.at(part) == pytest.approx(values[int(5000 * part) - 1], rel=0.012)
    assert Spread().at(0.5) == Spread().mean == 0.0


# -- the fleet --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_everything_and_twice_the_same(policy: str) -> None:
    replayed = sessions(20, 4)
    figures = [measure(ENGINE, replayed, 3, policy, 0.6, Random(3).random) for _ in range(2)]
    assert figures[0] == figures[1]
    assert 0 < figures[0].ttft_s.p50 <= figures[0].ttft_s.p90 <= figures[0].ttft_s.p99
    assert 0 <= figures[0].block_hit_rate < 1
    assert 1 <= figures[0].imbalance <= 3


def test_turns_go_where_their_conversation_is_unless_chance_decides() -> None:
    replayed = sessions(30, 6)
    found = {name: measure(ENGINE, replayed, 8, name, 0.4, Random(3).random) for name in ("kvd", "random")}
    assert found["kvd"].block_hit_rate > 0.6 > 2 * found["random"].block_hit_rate
    assert 2 * found["kvd"].ttft_s.mean < found["random"].ttft_s.mean


def test_siblings_of_a_burst_meet_before_any_event_tells_of_them() -> None:
    burst = [Prompt(0.0, [*range(100 * (n % 2), 100 * (n % 2) + 40), 1000 + n], 41 * 512, 10) for n in range(8)]
    fleet = Fleet(ENGINE, 512, 2, "kvd", Random(0).random)
    fleet.replay(burst)
    computed = sum(worker.computed for worker in fleet.members)
    # Each prefix once; a sibling that shares a step with the end of the first does not have that step's blocks yet.
    assert (2 * 40 + 8) * 512 <= computed <= (2 * 40 + 8 + 2 * 16) * 512


def test_the_router_knows_all_that_is_cached_and_all_that_is_there_in_the_end() -> None:
    fleet = Fleet(ENGINE, 512, 3, "kvd", Random(0).random)
    fleet.replay(sessions(40, 5), scale=0.2)
    fleet._learn(1e9)
    for number, worker in enumerate(fleet.members):
        for chain in {each.chain[0]: each.chain for each in fleet.jobs}.values():
            assert fleet._index.match(chain).get(number, 0) == worker._radix.match(chain)
    assert len(fleet._load) == 0


def test_a_load_of_one_is_what_one_cache_for_all_could_do() -> None:
    replayed = sessions(30, 6)
    once = sum(ENGINE.prefill_s(512, 0.0) for _ in {block for prompt in replayed for block in prompt.blocks})
    cold = sum(ENGINE.prefill_s(prompt.tokens, prompt.tokens**2 / 2) for prompt in replayed)
    assert once / 3 < work_s(ENGINE, replayed, 4) < cold
    assert scale(ENGINE, replayed, 4, 0.5) == pytest.approx(2 * scale(ENGINE, replayed, 4, 1.0))
    together = [Prompt(5.0, [1], 512, 5)] * 3
    assert scale(ENGINE, together, 4, 0.5) == 1.0


def test_a_prompt_that_no_worker_has_room_for_is_refused() -> None:
    with pytest.raises(KvdError, match="KV memory"):
        measure(ENGINE, [Prompt(0.0, list(range(2000)), 1_024_000, 5)], 2, "kvd", 0.5, Random(0).random)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACES)
def test_on_real_traces_nobody_is_faster_on_average(name: str) -> None:
    path = DATA / TRACES[name]
    if not path.exists():
        pytest.skip(f"needs the trace {TRACES[name]} in the shared data folder")
    replayed = prompts(path)[:2000]
    found = {policy: measure(ENGINE, replayed, 8, policy, 0.8, Random(0).random).ttft_s.mean for policy in POLICIES}
    assert found["kvd"] <= 1.02 * min(found.values())
    assert found["kvd"] < found["cache_aware"] < found["random"]


# -- traces and the command -------------------------------------------------------------------------------


def test_how_many_tokens_a_block_has_is_found_out() -> None:
    assert block_tokens([Prompt(0.0, list(range(14)), 6758, 1)] * 3) == 512
    assert block_tokens([Prompt(0.0, list(range(30)), 1935, 1)]) == 64


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl"
    lines = [
        {"timestamp": 1000 * each.at, "hash_ids": each.blocks, "input_length": each.tokens, "output_length": 20}
        for each in sessions(8, 3)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_json_has_percentiles_hits_and_imbalance_by_policy(small: Path) -> None:
    ran = kvdctl("simulate", "routing", "--trace", str(small), "--workers", "2", "--compare", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert list(found) == list(POLICIES)
    for figures in found.values():
        assert set(figures) == {"ttft_s", "itl_s", "block_hit_rate", "imbalance"}
        assert set(figures["ttft_s"]) == set(figures["itl_s"]) == {"mean", "p50", "p90", "p99"}


def test_the_table_has_a_line_for_each_policy_asked_for(small: Path) -> None:
    ran = kvdctl("simulate", "routing", "--trace", str(small), "--policy", "lmetric,kvd", "--load", "0.5")
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()] == ["policy", "lmetric", "kvd"]
    assert "TTFT s: mean" in ran.stdout


@pytest.mark.parametrize(
    "wrong",
    [("--policy", "magic"), ("--policy", "kvd", "--compare"), ("--policy", ""), ("--workers", "0"), ("--load", "0")],
)
def test_wrong_usage_exits_2(small: Path, wrong: tuple[str, ...]) -> None:
    assert kvdctl("simulate", "routing", "--trace", str(small), *wrong).returncode == 2


def test_a_trace_without_lengths_exits_1_and_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 1, "hash_ids": [1]}\n')
    ran = kvdctl("simulate", "routing", "--trace", str(path), "--json")
    assert ran.returncode == 1
    assert "input_length" in json.loads(ran.stderr)["hint"]


def line(*blocks: int, tokens: int = 512, output: int = 5) -> str:
    return json.dumps({"timestamp": 0, "hash_ids": blocks, "input_length": tokens, "output_length": output}) + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (line(1, tokens=0) + line(), "no request has blocks, a prompt and an answer"),
        (line(1) + line(2, 3, 2), "line 2: block 2 is there twice"),
        (line(7, 7), "line 1: block 7 is there twice"),
        (line(1, 2) + line(3) + line(3, 2), "line 3: block 2 had another one, or none, before it"),
        (line(1, 2) + line(2), "line 2: block 2 had another one, or none, before it"),
        (line(1) + line(1 << 63), "line 2: block 9223372036854775808 is no signed"),
        (line(1) + line(1)[:-2] + ', "x": ' + "[" * 100_000, "line 2: .*recursion"),
    ],
)
def test_what_no_fleet_could_replay_is_said_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(KvdError, match=says) as caught:
        prompts(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_the_first_requests_of_a_trace_are_enough_where_they_have_blocks(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line() + line(1, -(1 << 63)) + line(1, (1 << 63) - 1) + line(1))
    assert [prompt.blocks for prompt in prompts(path, 2)] == [[], [1, -(1 << 63)]]
    ran = kvdctl("simulate", "routing", "--trace", str(path), "--requests", "1")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"kvdctl: {path}: none of the first 1 requests has blocks")
    assert ran.stderr.count("\n") == 1
