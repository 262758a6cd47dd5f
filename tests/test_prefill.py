"""The plugin's observation of what computing costs its worker, in plain time."""

import random

import pytest

from kvd.sidecar.prefill import PrefillCosts

PAGE = 64


def keys(name: str, count: int) -> list[str]:
    return [f"{name}{n}" for n in range(count)]


def prefill(costs: PrefillCosts, name: str, before: int, found: int, missed: int, seconds: float) -> None:
    """A request: pages that the worker has, pages found by the lookup and read, pages computed."""
    wanted, now = keys(name, found + missed), 100.0
    costs.looked_up(wanted, found, before, now)
    if found:
        now += 5.0  # what reading takes is not computing
        costs.read(wanted[:found], found, now)
    costs.computed(wanted[found:], "", now + seconds)


def test_nothing_seen_is_no_cost() -> None:
    assert set(PrefillCosts(PAGE).costs().counters().values()) == {0}


def test_one_observation_is_a_rate() -> None:
    costs = PrefillCosts(PAGE)
    prefill(costs, "a", 0, 0, 10, 0.64)
    assert costs.costs().token_s == pytest.approx(0.001, rel=0.02)
    assert costs.costs().counters()["prefill_tokens_per_s"] == pytest.approx(1000, rel=0.02)


@pytest.mark.parametrize(
    ("token_s", "pair_s", "cached_s"), [(4e-3, 0.0, 1e-3), (1e-4, 1e-8, 0.0), (2e-5, 2e-9, 1e-6), (3e-3, 1e-6, 1e-3)]
)
def test_the_three_costs_are_told_apart(token_s: float, pair_s: float, cached_s: float) -> None:
    costs, draw = PrefillCosts(PAGE), random.Random(1)
    for n in range(48):
        cached, missed = draw.choice([0, 0, 10, 100]), draw.randint(1, 120)
        tokens, before = missed * PAGE, cached * PAGE
        seconds = token_s * tokens + pair_s * tokens * (before + tokens / 2) + cached_s * before
        prefill(costs, f"r{n}/", cached // 2, cached - cached // 2, missed, seconds)
    found = costs.costs()
    assert found.token_s == pytest.approx(token_s, rel=0.1)
    assert found.pair_s == pytest.approx(pair_s, rel=0.2, abs=1e-5 * token_s)
    assert found.cached_s == pytest.approx(cached_s, rel=0.2, abs=1e-2 * token_s)


def test_waiting_in_queues_hardly_counts() -> None:
    costs, draw = PrefillCosts(PAGE), random.Random(2)
    for n in range(48):
        missed = draw.randint(5, 50)
        waited = draw.choice([0.0, 0.0, 0.0, 1.0, 3.0])
        prefill(costs, f"r{n}/", 0, 0, missed, 0.001 * missed * PAGE + waited)
    assert 0.0009 < costs.costs().token_s < 0.0013


def test_a_prompt_that_is_computed_in_chunks_is_one_observation() -> None:
    costs = PrefillCosts(PAGE)
    wanted = keys("a", 100)
    costs.looked_up(wanted, 0, 0, 100.0)
    for at in range(0, 100, 25):
        parent = wanted[at - 1] if at else ""
        assert costs.computed(wanted[at : at + 25], parent, 101.0 + at / 25)
    assert costs.costs().token_s == pytest.approx(4.0 / 6400, rel=0.02)
    assert not costs.computed(["generated"], wanted[-1], 500.0), "what the worker wrote itself is no prompt"
    assert costs.costs().token_s == pytest.approx(4.0 / 6400, rel=0.02)


def test_a_prompt_that_is_stored_in_batches_counts_whole() -> None:
    costs = PrefillCosts(PAGE)
    wanted = keys("a", 300)
    costs.looked_up(wanted[:128], 0, 0, 100.0)  # SGLang asks no further
    for at in range(0, 300, 128):
        costs.computed(wanted[at : at + 128], wanted[at - 1] if at else "", 103.0 + at / 1e5)
    assert costs.costs().token_s == pytest.approx(3.0 / 300 / PAGE, rel=0.03)
    assert not costs.computed(["generated"], wanted[-1], 500.0)


def test_what_was_found_and_did_not_come_is_computed_too() -> None:
    costs = PrefillCosts(PAGE)
    wanted = keys("a", 20)
    costs.looked_up(wanted, 15, 0, 100.0)
    costs.read(wanted[:15], 5, 102.0)
    assert costs.computed(wanted[5:], "", 102.96)
    assert costs.costs().token_s == pytest.approx(0.001, rel=0.02)


def test_what_was_long_ago_is_forgotten() -> None:
    costs = PrefillCosts(PAGE)
    for n in range(50):
        prefill(costs, f"slow{n}/", 0, 0, 10, 6.4)
    for n in range(50):
        prefill(costs, f"fast{n}/", 0, 0, 10, 0.64)
    assert costs.costs().token_s == pytest.approx(0.001, rel=0.02)


def test_what_cached_tokens_cost_is_not_forgotten_while_there_are_none() -> None:
    costs = PrefillCosts(PAGE)
    for n in range(5):
        prefill(costs, f"hit{n}/", 0, 10, 10, 0.64 + 0.32)
    for n in range(100):
        prefill(costs, f"cold{n}/", 0, 0, 10 + n % 10, 0.064 * (10 + n % 10))
    assert costs.costs().cached_s == pytest.approx(0.0005, rel=0.1)


def test_what_was_not_missed_is_no_observation_and_lookups_that_lead_nowhere_are_bounded() -> None:
    costs = PrefillCosts(PAGE)
    assert not costs.computed(["never missed"], "", 5.0)
    for n in range(1000):
        costs.looked_up([f"k{n}"], 0, 0, 1.0)
    assert not costs.computed(["k0"], "", 2.0)
    assert costs.computed(["k999"], "", 2.0)
