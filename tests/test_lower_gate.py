"""What is fetched from a tier below, and what is not: the gate in the node, in plain time."""

import pytest

from kvd import wire
from kvd.daemon.gate import PROBE_PAGES
from tests.node_world import KEYS, spec
from tests.two_tiers import TwoTiers


@pytest.fixture
def world() -> TwoTiers:
    return TwoTiers()


def test_a_reader_gives_up_when_the_tier_is_much_slower_than_it_was(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    (lower,) = world.node.promotion.tiers
    lower.disk.observe(1 << 30, 1.0, world.now)
    told: list[int] = []
    request = wire.LeasePages(1, 0, b"".join(KEYS[0]), 5.0, 2.0)
    coming = world.node.reading.on_the_way(session, request, world.now)
    until = world.node.promotion.wait(coming, world.now + 2.0, lambda: told.append(1))
    assert world.now < until < world.now + 1.0
    world.now = until
    world.node.tick(world.now)
    assert told == [1]
    world.tier.answer()
    assert world.take(session, KEYS[0]) == [True] * 15, "what was on its way is there for the next"


def test_what_does_not_pay_is_not_given_out_and_the_tier_is_measured_beside_it(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    world.node.report(session, "closed", {"prefill_ns_per_token": 1000})
    assert world.lookup(session, KEYS[0]) == 0
    assert world.node.counters["gate_untried"] == 1
    world.now += 0.1
    world.tier.answer()
    (lower,) = world.node.promotion.tiers
    assert lower.disk.known
    assert len(world.node.residency) == PROBE_PAGES
    assert world.lookup(session, KEYS[0]) == PROBE_PAGES, "these are in RAM now, and the others do not pay"
    assert world.node.counters["gate_slower"] == 1
    world.now += 60
    assert world.lookup(session, KEYS[0]) == PROBE_PAGES
    world.now += 1e-6
    world.tier.answer()
    assert world.node.counters["gate_stale"] == 1
    assert len(world.node.residency) == 2 * PROBE_PAGES


def test_a_worker_that_has_just_started_is_judged_as_others_of_its_kind(world: TwoTiers) -> None:
    session = world.session(spec(1))
    world.put(session, KEYS[0] + KEYS[1])
    world.settle()
    world.evict_all()
    (lower,) = world.node.promotion.tiers
    lower.disk.observe(1 << 20, 1.0, world.now)
    world.node.report(session, "closed", {"prefill_ns_per_token": 1})
    assert world.lookup(session, KEYS[0]) == 0
    assert world.lookup(world.session(spec(1)), KEYS[0]) == 0
    assert world.node.counters["gate_slower"] == 2


def test_the_second_batch_of_a_prefix_is_not_charged_for_the_first(world: TwoTiers) -> None:
    session, other = world.session(spec(1)), world.session(spec(1))
    world.put(session, KEYS[0])
    world.settle()
    world.evict_all()
    (lower,) = world.node.promotion.tiers
    lower.disk.observe(1 << 20, 0.5, world.now)
    page_s = spec(1).page_bytes / lower.disk.bytes_per_s
    for asker in (session, other):  # eight pages cost eight page_s, and all 15 save less than 20
        cost = int(1.5e9 * page_s / spec(1).page_tokens)
        world.node.report(asker, "closed", {"prefill_ns_per_token": cost})
    assert world.lookup(session, KEYS[0][:8]) == 8
    ask = wire.Lookup(1, 0, b"".join(KEYS[0][8:]), 10.0, 1.0, 8, KEYS[0][7])
    assert world.node.reading.lookup(other, ask, world.now).pages == 0, "it would wait for another's"
    assert world.node.reading.lookup(session, ask, world.now).pages == 7
