"""Costs that are learnt: from far-off priors, beside outliers, and again when an engine has changed."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.router.rates import ANSWER_TOKENS, DECODE, PREFILL, Rates
from kvd.router.regression import Regression
from kvd.router.work import Work


def prompts(count: int, seed: int = 1) -> list[Work]:
    chance = random.Random(seed)
    return [Work.of(chance.randrange(200, 20_000), chance.choice([0, 0, 4096])) for _ in range(count)]


@pytest.mark.parametrize("factor", [0.05, 1.0, 300.0])
def test_an_engine_of_any_speed_is_known_after_some_prompts(factor: float) -> None:
    truth = (0.02 * factor, 5e-5 * factor, 1e-9 * factor)
    rates, chance = Rates(), random.Random(7)
    for work in prompts(64):
        seconds = sum(c * part for c, part in zip(truth, work, strict=True))
        rates.prefilled(work, seconds * chance.uniform(0.95, 1.05))
    rates.learn()
    for work in prompts(50, seed=2):
        seconds = sum(c * part for c, part in zip(truth, work, strict=True))
        assert rates.prefill_s(work) == pytest.approx(seconds, rel=0.1)


def test_one_observation_sets_the_scale() -> None:
    rates = Rates()
    rates.prefilled(Work.of(4000, 0), 100 * sum(c * p for c, p in zip(PREFILL, Work.of(4000, 0), strict=True)))
    assert rates.prefill_s(Work.of(2000, 0)) == pytest.approx(
        100 * sum(c * p for c, p in zip(PREFILL, Work.of(2000, 0), strict=True)), rel=0.01
    )


def test_what_something_got_in_the_way_of_changes_little() -> None:
    rates, chance = Rates(), random.Random(3)
    for number, work in enumerate(prompts(96)):
        seconds = sum(c * part for c, part in zip(PREFILL, work, strict=True)) * chance.uniform(0.97, 1.03)
        rates.prefilled(work, seconds * (20.0 if number % 6 == 0 else 1.0))
    rates.learn()
    work = Work.of(8000, 0)
    assert rates.prefill_s(work) == pytest.approx(
        sum(c * part for c, part in zip(PREFILL, work, strict=True)), rel=0.1
    )


def test_an_engine_that_has_changed_is_learnt_anew() -> None:
    rates = Rates()
    for factor in (1.0, 4.0):
        for work in prompts(300):
            rates.prefilled(work, factor * sum(c * part for c, part in zip(PREFILL, work, strict=True)))
        rates.learn()
    work = Work.of(8000, 0)
    assert rates.prefill_s(work) == pytest.approx(
        4 * sum(c * part for c, part in zip(PREFILL, work, strict=True)), rel=0.05
    )


def test_what_observations_do_not_tell_apart_is_split_as_in_the_prior() -> None:
    rates = Rates()
    for _ in range(40):
        rates.decoded(16, 16_000, 3 * sum(c * p for c, p in zip(DECODE, (1, 16, 16_000), strict=True)))
    rates.learn()
    assert rates.interval_s(32, 32_000) == pytest.approx(
        3 * sum(c * p for c, p in zip(DECODE, (1, 32, 32_000), strict=True)), rel=0.02
    )


def test_a_worker_that_nothing_is_known_of_is_as_fast_as_its_kind() -> None:
    kind, known, new = Rates(), Rates(), Rates()
    known.follow(kind)
    new.follow(kind)
    work, slow = Work.of(1000, 0), 200 * sum(c * p for c, p in zip(PREFILL, Work.of(1000, 0), strict=True))
    for _ in range(3):
        known.prefilled(work, slow)
    known.decoded(1, 1000, 0.5)
    known.answered(9)
    assert known.prefill_s(work) == pytest.approx(slow, rel=0.01)
    assert new.prefill_s(work) == pytest.approx(slow, rel=0.01)
    assert (new.interval_s(1, 1000), new.answer_tokens) == (known.interval_s(1, 1000), 9)
    for _ in range(5):
        new.prefilled(work, slow / 10)
    new.answered(99)
    assert new.prefill_s(work) == pytest.approx(slow / 10, rel=0.01), "what is known of itself comes first"
    for _ in range(5):
        known.prefilled(work, slow)
    assert known.prefill_s(work) == pytest.approx(slow, rel=0.01), "and is its own"
    assert (new.answer_tokens, known.answer_tokens, kind.answer_tokens) == (99, 9, 54)


def test_what_was_done_as_another_kind_says_nothing() -> None:
    rates, old, new = Rates(), Rates(), Rates()
    rates.follow(old)
    work = Work.of(1000, 0)
    rates.prefilled(work, 9.0)
    rates.answered(5)
    rates.follow(old)
    assert rates.prefill_s(work) == pytest.approx(9.0, rel=0.01), "it is still the same kind"
    rates.follow(new)
    assert (rates.prefill_s(work), rates.answer_tokens) == (Rates().prefill_s(work), ANSWER_TOKENS)
    rates.prefilled(work, 3.0)
    assert (old.prefill.observed, new.prefill.observed) == (1, 1)


def test_workers_of_a_kind_are_alike_unless_one_is_much_slower() -> None:
    kind, few, slow = Rates(), Rates(), Rates()
    few.follow(kind)
    slow.follow(kind)
    truth, chance = (0.02, 5e-5, 1e-9), random.Random(5)
    for number, work in enumerate(prompts(200)):
        seconds = sum(c * part for c, part in zip(truth, work, strict=True))
        kind.prefilled(work, seconds * chance.uniform(0.95, 1.05))
        if number % 20 == 0:
            few.prefilled(work, seconds * chance.uniform(0.8, 1.25))
            slow.prefilled(work, 5 * seconds * chance.uniform(0.8, 1.25))
    for rates in (kind, few, slow):
        rates.learn()
    for work in prompts(50, seed=2):
        seconds = sum(c * part for c, part in zip(truth, work, strict=True))
        assert few.prefill_s(work) == kind.prefill_s(work) == pytest.approx(seconds, rel=0.15)
        assert slow.prefill_s(work) == pytest.approx(5 * seconds, rel=0.3)


def test_one_slow_first_prompt_makes_no_slow_worker() -> None:
    kind, unlucky, other = Rates(), Rates(), Rates()
    unlucky.follow(kind)
    other.follow(kind)
    work, usual = Work.of(1000, 0), Rates().prefill_s(Work.of(1000, 0))
    unlucky.prefilled(work, 200 * usual)  # it compiled its kernels
    for _ in range(20):
        other.prefilled(work, usual)
    kind.learn()
    assert unlucky.prefill_s(work) == pytest.approx(usual, rel=0.1), "it would never be chosen again"
    late = Rates()
    late.follow(kind)
    late.prefilled(work, 200 * usual)
    assert late.prefill_s(work) == pytest.approx(usual, rel=0.1)


def test_who_was_slow_is_as_fast_as_its_kind_again_when_nothing_more_is_seen_of_it() -> None:
    kind, slow, steady = Rates(), Rates(), Rates()
    work, usual = Work.of(1000, 0), Rates().prefill_s(Work.of(1000, 0))
    for _ in range(100):
        kind.prefilled(work, usual)
    for rates in (slow, steady):
        rates.follow(kind)
        for _ in range(40):
            rates.prefilled(work, 5 * usual)
    for second in range(60 * 60):
        if second % 50 == 0:
            steady.prefilled(work, 5 * usual)
        for rates in (kind, slow, steady):
            rates.learn()
        if second == 60 * 10:
            assert slow.prefill_s(work) == pytest.approx(5 * usual, rel=0.1), "not at once"
    assert slow.prefill_s(work) == kind.prefill_s(work)
    assert steady.prefill_s(work) == pytest.approx(5 * usual, rel=0.1), "of which something was seen"


def test_what_a_node_says_of_its_tiers_is_believed() -> None:
    rates = Rates(token_bytes=100_000)
    before = rates.load_s("ram", 10_000)
    rates.told("nvme", 0.01, 5e9)
    assert rates.load_s("nvme", 10_000) == pytest.approx(0.01 + 0.2)
    assert rates.load_s("nvme", 0) == 0.0
    assert rates.load_s("ram", 10_000) == before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e9), st.floats(-1, 1e6)), max_size=24))
def test_no_observation_makes_a_cost_negative_or_not_a_number(seen: list[tuple[float, float, float]]) -> None:
    regression = Regression((1e-2, 1e-5, 1e-9))
    for tokens, pairs, seconds in seen:
        regression.observe((1.0, tokens, pairs), seconds)
        assert all(0.0 <= c < 1e12 for c in regression.coefficients)
    assert regression.predict((1.0, 100.0, 1e4)) >= 0.0
