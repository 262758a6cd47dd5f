"""The policy's parts by themselves: what is learnt, who leaves, what tenants may take. No trace, no clock."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.storage.policy import Policy
from kvd.storage.quota import Quotas, Share, loser
from kvd.storage.reuse import AGES, Reuse, age_of
from kvd.storage.sketch import MOST, Sketch
from kvd.storage.worth import KINDS, TRAITS, Worth, trait

PLAIN = trait(0, 1, False)

# -- the order before anything is learnt ------------------------------------------------------------------


def filled(places: int) -> Policy:
    """Page n lies in place n and was used at n seconds."""
    policy = Policy(Worth(places))
    for place in range(places):
        policy.enter(place, PLAIN, float(place))
        policy.offer(place, float(place))
    return policy


def test_without_experience_the_least_recently_used_page_leaves() -> None:
    policy = filled(8)
    policy.use(0, TRAITS + PLAIN, 8.0)
    assert policy.victims(3, 100.0) == [1, 2, 3]
    policy.check()


def test_a_victim_is_not_offered_again_until_the_caller_says_so() -> None:
    policy = filled(3)
    assert policy.victims(2, 10.0) == [0, 1]
    assert policy.victims(5, 10.0) == [2]
    assert policy.lowest() == math.inf
    policy.offer(1, 11.0)
    assert policy.victims(5, 11.0) == [1]


def test_withdrawn_and_disallowed_pages_stay() -> None:
    policy = filled(4)
    policy.withdraw(0)
    assert policy.victims(4, 10.0, lambda place: place != 1) == [2, 3]
    assert policy.victims(4, 10.0) == [1]


def test_a_page_worth_less_than_the_others_is_refused() -> None:
    policy = filled(4)
    assert policy.victims(1, 4.0, below=0.0) == []
    assert policy.victims(1, 4.0, below=policy.density(1, 4.0)) == [0]


def test_a_choice_after_a_long_pause_moves_few_pages() -> None:
    policy = filled(3000)
    assert policy.victims(1, 1e6) == [0]
    policy.check()
    assert sum(line % AGES < AGES - 1 for line in policy._line) > 2000
    assert sorted(policy.victims(3000, 1e6)) == list(range(1, 3000))


@settings(deadline=None)  # machines differ
@given(st.lists(st.tuples(st.sampled_from("uowvl"), st.integers(0, 9), st.integers(0, 400)), max_size=200))
def test_lines_hold_whatever_is_asked(steps: list[tuple[str, int, int]]) -> None:
    worth, now, offered = Worth(10), 0.0, set[int]()
    policy = Policy(worth)
    for place in range(10):
        policy.enter(place, PLAIN, now)
    for what, place, later in steps:
        now += later
        if what == "u":
            policy.use(place, worth.use(place, trait(place, later, False), now), now)
        elif what == "l":
            worth.learn(now)
        elif what == "o":
            policy.offer(place, now)
            offered.add(place)
        elif what == "w":
            policy.withdraw(place)
            offered.discard(place)
        else:
            chosen = policy.victims(2, now)
            assert len(chosen) == min(2, len(offered))
            assert offered.issuperset(chosen)
            offered.difference_update(chosen)
        policy.check()


def test_the_same_calls_give_the_same_victims() -> None:
    def play() -> list[int]:
        draw, policy, chosen, worth = random.Random(7), filled(64), list[int](), Worth(64)
        for step in range(10_000):
            place, now = draw.randrange(64), 64.0 + step / 10
            policy.use(place, worth.use(1000 + place, trait(place, step % 40, False), now), now)
            if step % 50 == 0:
                chosen += policy.victims(1, now)
                policy.offer(chosen[-1], now)
        return chosen

    assert play() == play()


# -- what is learnt ---------------------------------------------------------------------------------------


def test_pages_that_come_back_are_kept_and_others_are_refused() -> None:
    """Odd keys return after ten seconds, every time; even ones never. Their kinds tell them apart."""
    worth = Worth(100)
    good, bad = trait(0, 0, False), trait(0, 100, False)
    for now in range(6000):
        worth.use(1 + 2 * (now % 10), good, float(now))
        worth.use(2 * now + 100, bad, float(now))
        if worth.due:
            worth.learn(float(now))
    assert worth.density(worth.kind(1, good)) > 10 * worth.density(worth.kind(99_990, bad))


def test_a_page_is_worth_more_just_before_it_is_expected() -> None:
    reuse = Reuse(1)
    for now in range(5000):
        reuse.used(now % 40, 0, float(now))
    reuse.learn(5000.0)
    density = reuse.density[0]
    expected = age_of(40.0)
    assert density[expected] > density[0] > density[expected + 1]


def test_densities_without_experience_fall_with_age() -> None:
    density = Reuse(1).density[0]
    assert list(density) == sorted(density, reverse=True)
    assert len(density) == AGES


def test_the_sample_is_bounded_and_goes_by_key() -> None:
    reuse = Reuse(1, sample=100)
    for key in range(10_000):
        reuse.used(key, 0, float(key))
    assert 20 <= len(reuse) <= 100
    again = Reuse(1, sample=100)
    for key in range(10_000):
        again.used(key, 0, float(key))
    assert len(again) == len(reuse)


@pytest.mark.parametrize(("seconds", "age"), [(-1, 0), (0, 0), (0.99, 0), (1, 1), (2.9, 1), (3, 2), (1e12, AGES - 1)])
def test_ages_double(seconds: float, age: int) -> None:
    assert age_of(seconds) == age


def test_the_sketch_counts_and_forgets() -> None:
    sketch = Sketch(10)
    assert [sketch.add(5) for _ in range(6)] == [0, 1, 2, 3, 3, 3]
    assert sketch.count(5) == MOST
    for key in range(1000, 1000 + 3 * (1 << 16)):
        sketch.add(key)
    assert sketch.count(5) < MOST


def test_the_sketch_seldom_counts_what_it_has_not_seen() -> None:
    sketch, draw = Sketch(10), random.Random(1)
    keys = [draw.getrandbits(64) for _ in range(60_000)]
    for key in keys:
        sketch.add(key)
    assert all(sketch.count(key) for key in keys)
    assert sum(sketch.count(draw.getrandbits(64)) > 0 for _ in range(10_000)) < 300


def test_every_trait_has_a_kind_of_its_own() -> None:
    traits = {trait(d, f, last) for d in (0, 1, 4, 16, 48) for f in (0, 3, 8, 32) for last in (False, True)}
    assert traits == set(range(40))
    assert KINDS == 40 * (MOST + 1)


# -- tenants --------------------------------------------------------------------------


def tenants(shares: dict[str, Share], **held: int) -> Quotas:
    """Pages have 10 bytes; `held` are pages."""
    quotas = Quotas(shares)
    for owner, pages in held.items():
        quotas.charge(owner, 10 * pages)
    return quotas


def test_without_shares_the_least_dense_page_leaves_whosever_it_is() -> None:
    quotas = tenants({}, a=2, b=2)
    assert loser(quotas, "a", 10, 10, {"a": 0.2, "b": 0.1}) == "b"
    assert loser(quotas, "a", 10, 10, {}) is None


def test_a_tenant_keeps_its_reserve_against_others_but_not_against_itself() -> None:
    quotas = tenants({"a": Share(reserve_bytes=20)}, a=2, b=1)
    assert loser(quotas, "b", 10, 10, {"a": 0.1, "b": 0.2}) == "b"
    assert loser(quotas, "b", 10, 10, {"a": 0.1}) is None
    assert loser(quotas, "a", 10, 10, {"a": 0.1, "b": 0.2}) == "a"
    quotas.charge("a", 10)
    assert loser(quotas, "b", 10, 10, {"a": 0.1, "b": 0.2}) == "a"


def test_a_tenant_above_its_burst_loses_first() -> None:
    quotas = tenants({"b": Share(burst_bytes=10)}, a=2, b=2)
    assert loser(quotas, "a", 10, 10, {"a": 0.1, "b": 0.9}) == "b"
    quotas.release("b", 10)
    assert loser(quotas, "a", 10, 10, {"a": 0.1, "b": 0.9}) == "a"


def test_a_tenant_at_its_burst_makes_room_for_itself() -> None:
    quotas = tenants({"b": Share(burst_bytes=20)}, a=2, b=2)
    assert loser(quotas, "b", 10, 10, {"a": 0.1, "b": 0.9}) == "b"
    assert loser(quotas, "b", 10, 10, {"a": 0.1}) is None


def test_what_is_held_follows_charge_and_release() -> None:
    quotas = Quotas()
    quotas.charge("a", 30)
    quotas.release("a", 10)
    assert quotas.held("a") == 20
    with pytest.raises(AssertionError, match="more than it holds"):
        quotas.release("a", 21)
    assert quotas.held("a") == 20
    with pytest.raises(ValueError, match="does not fit"):
        Share(reserve_bytes=2, burst_bytes=1)
