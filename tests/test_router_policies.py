"""Policies behind one interface: the baselines as their sources define them, and ours, which counts seconds."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from kvd.router.cost import Ahead, Busy, cost, later_s, prefix, room_s, step_s
from kvd.router.load import Load
from kvd.router.policies.baselines import CacheAware, Dynamo, Lmetric, Random, RoundRobin
from kvd.router.policies.choice import Candidate, Matched, Policy
from kvd.router.policies.kvd import Kvd
from kvd.router.rates import Rates
from kvd.router.work import Request, Work

RATES = Rates(token_bytes=100_000)


def request(name: str = "r", tokens: int = 8192, first: int = 0) -> Request:
    return Request(name, tokens, range(first, first + tokens // 512), 512)


def busy(prompts: int = 1, tokens: int = 50_000, running: int = 0, context: int = 0, now: float = 0.0) -> Load:
    """One that begins with its work just now."""
    work = Work(prompts, tokens, tokens * 4000.0)
    return Load(work, work, now, running, context, 500_000, context)


def idle(free: int = 500_000, running: int = 0, context: int = 0) -> Load:
    return Load(running=running, context_tokens=context, free_tokens=free, held_tokens=context)


def of(*loads: Load, matched: Sequence[Matched] | None = None) -> list[Candidate]:
    prefixes = matched or [Matched()] * len(loads)
    return [Candidate(f"w{at}", m, load) for at, (load, m) in enumerate(zip(loads, prefixes, strict=True))]


def ours() -> Kvd:
    return Kvd(lambda worker: RATES)


def half() -> float:
    return 0.5


ALL: list[Policy] = [Random(half), RoundRobin(), CacheAware(), Dynamo(half), Lmetric(half), ours()]


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_every_policy_ranks_every_candidate_once(policy: Policy) -> None:
    candidates = of(idle(), busy(), idle(running=3), matched=[Matched(), Matched(gpu=4096), Matched(ram=512)])
    for number in range(5):
        choice = policy.choose(request(f"r{number}"), candidates, now=float(number))
        assert sorted(each.candidate.worker for each in choice.ranked) == ["w0", "w1", "w2"]
        assert choice.worker == choice.ranked[0].candidate.worker
        assert [each.cost for each in choice.ranked] == sorted(each.cost for each in choice.ranked)
    assert policy.choose(request(), candidates[:1], now=9.0).worker == "w0"


# -- the baselines ----------------------------------------------------------------------------------------


def test_round_robin_takes_turns_also_when_workers_come_and_go() -> None:
    policy, all_of = RoundRobin(), of(idle(), idle(), idle())
    assert [policy.choose(request(), all_of, 0.0).worker for _ in range(4)] == ["w0", "w1", "w2", "w0"]
    assert policy.choose(request(), all_of[2:], 0.0).worker == "w2"
    assert policy.choose(request(), all_of, 0.0).worker == "w0"


def test_cache_aware_follows_its_own_tree_until_load_is_uneven() -> None:
    policy = CacheAware()
    assert policy.choose(request(), of(idle(), idle()), 0.0).worker == "w0"  # the first of equals
    assert policy.choose(request(), of(idle(running=60), idle()), 0.0).worker == "w0"
    assert policy.choose(request(), of(idle(running=65), idle()), 0.0).worker == "w1"
    assert policy.choose(request(first=1000), of(idle(running=2), idle(running=1)), 0.0).worker == "w1"


def test_dynamo_counts_blocks_and_credits_tiers() -> None:
    candidates = of(idle(), idle(), idle(), matched=[Matched(), Matched(gpu=4096), Matched(ram=8192)])
    costs = {each.candidate.worker: each.cost for each in Dynamo(half).choose(request(), candidates, 0.0).ranked}
    assert costs == {"w0": 16 + 16, "w1": 8 + 16, "w2": 4 + 16}


def test_lmetric_multiplies_new_tokens_by_the_batch() -> None:
    candidates = of(idle(running=9), idle(running=1), matched=[Matched(gpu=7168), Matched()])
    costs = {each.candidate.worker: each.cost for each in Lmetric(half).choose(request(), candidates, 0.0).ranked}
    assert costs == {"w0": 1025 * 10, "w1": 8193 * 2}


# -- ours -------------------------------------------------------------------------------------------------


def test_a_prefix_wins_as_long_as_waiting_for_it_is_faster() -> None:
    prefixes = [Matched(gpu=7680), Matched()]
    assert ours().choose(request(), of(idle(), idle(), matched=prefixes), 0.0).worker == "w0"
    assert ours().choose(request(), of(busy(tokens=1000), idle(), matched=prefixes), 0.0).worker == "w0"
    assert ours().choose(request(), of(busy(tokens=50_000), idle(), matched=prefixes), 0.0).worker == "w1"


def test_terms_add_up_to_the_cost_and_say_when_the_first_token_comes() -> None:
    choice = ours().choose(request(), of(busy(running=3, context=9000), idle(), matched=[Matched(nvme=8192)] * 2), 0.0)
    for each in choice.ranked:
        assert each.cost == pytest.approx(sum(each.terms.values()))
        assert each.ttft_s == pytest.approx(
            sum(each.terms[name] for name in ("queue_s", "room_s", "load_s", "compute_s"))
        )


def test_equals_are_told_apart_by_free_memory_then_by_chance_that_stays() -> None:
    assert ours().choose(request(), of(idle(free=1000), idle(free=2000)), 0.0).worker == "w1"
    workers = [ours().choose(request(first=n), of(idle(), idle(), idle()), 0.0).worker for n in range(300)]
    assert all(60 < workers.count(worker) < 140 for worker in ("w0", "w1", "w2"))
    assert workers == [ours().choose(request(first=n), of(idle(), idle(), idle()), 0.0).worker for n in range(300)]


def test_a_full_worker_is_waited_for_only_if_that_is_worth_it() -> None:
    for free, worker in ((-5000, "w0"), (-100_000, "w1")):
        full = idle(free=free, running=20, context=400_000)
        candidates = of(full, idle(), matched=[Matched(gpu=7680), Matched()])
        assert ours().choose(request(), candidates, 0.0).worker == worker


def test_many_running_requests_count_against_a_worker() -> None:
    choice = ours().choose(request(), of(idle(running=100, context=100_000), idle(running=1, context=1000)), 0.0)
    assert choice.worker == "w1"
    assert choice.ranked[1].terms["interval_s"] > choice.ranked[0].terms["interval_s"]


def test_work_costs_more_where_more_requests_come_to_wait_for_it() -> None:
    half, full = Busy(0.0, 0.5, 0.0), Busy(0.0, 0.9, 0.0)
    assert later_s(2.0, 1.0, 5.0, half) == pytest.approx(50 * later_s(2.0, 1.0, 0.1, half))
    assert later_s(2.0, 3.0, 0.1, half) == pytest.approx(3 * later_s(2.0, 1.0, 0.1, half))
    assert later_s(2.0, 1.0, 0.1, full) == pytest.approx(5 * later_s(2.0, 1.0, 0.1, half))


def test_who_comes_while_a_prompt_is_computed_waits_for_the_rest_of_it_or_goes_elsewhere() -> None:
    bound = Busy(arrivals_per_s=0.5, load=0.0, elsewhere_s=100.0)
    assert later_s(4.0, 0.0, 9.0, bound) == pytest.approx(0.5 * 4.0 * 2.0)  # half of it on average
    assert later_s(4.0, 0.0, 9.0, replace(bound, elsewhere_s=1.0)) == pytest.approx(0.5 * (3.0 * 1.0 + 1.0 * 0.5))
    assert later_s(4.0, 0.0, 9.0, replace(bound, elsewhere_s=0.0)) == 0.0


def test_a_prompt_leaves_its_prefix_later_where_others_depend_on_theirs() -> None:
    """A line of a second, against two seconds of computing at an idle worker: who is bound to that one would wait."""
    longer, prefixes = request("r", 65_536), [Matched(gpu=65_000), Matched()]
    candidates = of(busy(tokens=60_000), idle(), matched=prefixes)
    assert ours().choose(longer, candidates, 0.0).worker == "w0"
    assert ours().choose(longer, of(busy(tokens=160_000), idle(), matched=prefixes), 0.0).worker == "w1"
    policy = ours()
    for number in range(200):  # prompts whose prefixes are at one worker only
        policy.choose(longer._replace(id=str(number)), of(idle(), idle(), matched=prefixes), number / 50)
    assert policy.choose(longer, of(busy(tokens=160_000, now=4.0), idle(), matched=prefixes), 4.0).worker == "w0"


def test_room_counts_as_far_as_it_takes_longer_than_the_line() -> None:
    full = idle(free=-100_000, running=20, context=400_000)
    waits_s = room_s(8192, full, RATES)
    assert room_s(8192, replace(full, held_tokens=40_000), RATES) == pytest.approx(10 * waits_s), (
        "siblings leave little"
    )
    assert waits_s > 1.0
    for before, line_s in ((Work.of(8192, 0), RATES.prefill_s(Work.of(8192, 0))), (Work.of(400_000, 0), 1e9)):
        ahead = Ahead.of(replace(full, queued=before, head=before), RATES)
        terms = cost(8192, Matched(), ahead, RATES, 0.0, Busy(0.0, 0.0, 0.0), now=0.0)
        assert terms.room_s == pytest.approx(max(0.0, waits_s - line_s))


def test_a_rush_is_seen_from_the_first_seconds_on() -> None:
    policy = ours()

    def comes(name: str, now: float) -> float:
        there = of(busy(now=now), busy(now=now))
        return policy.choose(request(name, 1024), there, now).winner.terms["later_s"]

    for number in range(50):
        comes(f"r{number}", number / 10)
    early = comes("early", 5.0)
    for number in range(50, 1200):
        comes(f"r{number}", number / 10)
    late = comes("late", 120.0)
    assert early == pytest.approx(late, rel=0.1)  # as many came per second


def test_workers_that_have_gone_are_forgotten() -> None:
    policy = ours()
    policy.choose(request(), of(idle(), idle(), idle()), now=0.0)
    for minute in range(1, 9):
        policy.choose(request(), of(idle()), now=60.0 * minute)
    assert set(policy._known) == {"w0"}


def test_a_long_prompt_goes_to_the_worker_where_few_come() -> None:
    policy = ours()

    def loads(now: float) -> list[Candidate]:
        return of(busy(tokens=20_000, now=now), busy(tokens=20_000, now=now))

    for number in range(60):
        few, now = number % 10 == 0, number / 10  # a worker that is not asked about is not forgotten for that
        policy.choose(request(f"r{number}", 1024, first=number), loads(now)[few : few + 1], now)
    choice = policy.choose(request("long", 65_536), loads(6.0), now=6.0)
    terms = {each.candidate.worker: each.terms["later_s"] for each in choice.ranked}
    assert (choice.worker, terms["w1"] < terms["w0"]) == ("w1", True)


def test_prompts_that_would_share_a_step_count_for_each_other() -> None:
    small = Work.of(100, 0)
    waiting = Ahead.of(Load(queued=small.plus(small), head=small, running=4, context_tokens=4000), RATES)
    assert step_s(4000, waiting, RATES, now=0.0) == pytest.approx(2 * RATES.prefill_s(Work.of(4000, 0)))
    assert step_s(4000, Ahead.of(Load(), RATES), RATES, now=0.0) == 0.0
    # Once it has begun that step cannot grow any more.
    assert step_s(4000, waiting, RATES, now=10.0) == pytest.approx(RATES.prefill_s(Work.of(4000, 0)))


# -- load or recompute ------------------------------------------------------------------------------------


def test_what_a_tier_has_is_loaded_where_that_beats_computing() -> None:
    slow = Rates(token_bytes=100_000)
    slow.told("nvme", 0.0, 80e6)
    there = Matched(gpu=1024, nvme=8192)
    assert prefix(8192, there, slow).load_s == 0.0
    assert prefix(8192, there, slow).cached == 1024
    fast = Rates(token_bytes=100_000)
    fast.told("nvme", 0.005, 18e9)
    loaded = prefix(8192, there, fast)
    assert loaded.cached == 8192
    assert 0 < loaded.load_s < prefix(8192, Matched(gpu=1024), fast).compute_s


def test_a_nearer_tier_is_used_and_a_farther_one_left_where_it_does_not_pay() -> None:
    rates = Rates(token_bytes=100_000)
    rates.told("shared", 0.0, 20e6)
    rates.told("ram", 0.0, 20e9)
    assert prefix(8192, Matched(ram=4096, shared=8192), rates).cached == 4096


def test_a_slow_piece_in_the_middle_is_loaded_for_what_comes_after_it() -> None:
    rates = Rates(token_bytes=100_000)
    rates.told("nvme", 0.05, 1e12)
    rates.told("shared", 0.01, 1e12)
    assert prefix(65_536, Matched(nvme=512, shared=65_536), rates).cached == 65_536


def test_the_queue_shrinks_while_its_head_is_computed() -> None:
    work = Work.of(8192, 0)
    ahead = Ahead.of(Load(work.plus(work), work, head_at=7.0), RATES)
    whole = ahead.queue_s(7.0)
    assert whole == pytest.approx(2 * RATES.prefill_s(work))
    assert ahead.queue_s(7.1) == pytest.approx(whole - 0.1)
    assert ahead.queue_s(99.0) == pytest.approx(whole / 2)
    assert Ahead.of(Load(), RATES).queue_s(7.0) == 0.0


def test_what_is_ahead_holds_until_the_load_or_the_rates_are_others() -> None:
    rates, load = Rates(), idle(running=1)
    ahead = Ahead.of(load, rates)
    assert ahead.holds(load, rates)
    assert not ahead.holds(idle(running=1), rates)
    rates.prefilled(Work.of(8192, 0), 9.0)
    assert not ahead.holds(load, rates)
    ahead = Ahead.of(load, rates)
    rates.decoded(1, 1000, 9.0)
    assert not ahead.holds(load, rates)
    ahead = Ahead.of(load, rates)
    rates.chunk_tokens *= 2
    assert not ahead.holds(load, rates)
    assert Ahead.of(load, rates).holds(load, rates)


def test_a_worker_that_does_not_get_on_is_as_slow_as_it_looks() -> None:
    work = Work.of(4000, 0)
    alone_s = RATES.prefill_s(work)
    waiting = Ahead.of(Load(work, work), RATES)
    for now, slow in ((0.0, 1.0), (1.9 * alone_s, 1.0), (2.5 * alone_s, 1.5), (101 * alone_s, 100.0)):
        assert waiting.slow(now) == pytest.approx(slow)
    assert Ahead.of(Load(), RATES).slow(1e6) == 1.0
    assert Ahead.of(Load(work), RATES).slow(1e6) == 1.0, "others' prompts: nobody knows since when"
    mates = Work(4, 4 * work.tokens // 2, 4 * work.pairs / 2)  # one step computes them all
    assert Ahead.of(Load(mates, work), RATES).slow(2 * RATES.prefill_s(mates)) == 1.0
    nobody, free = Busy(0.0, 0.0, 0.0), Ahead.of(Load(), RATES)
    there, here = (cost(4000, Matched(gpu=3900), ahead, RATES, 0.0, nobody, 60.0) for ahead in (waiting, free))
    assert there.compute_s > 10 * here.compute_s
    assert cost(4000, Matched(), free, RATES, 0.0, nobody, 60.0).ttft_s < there.ttft_s, "its prefix does not help"
