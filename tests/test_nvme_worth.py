"""What leaves a full NVMe tier: what the judge says is worth least, and what nobody used for its time to live."""

import time
from pathlib import Path

import pytest

from kvd.storage.nvme import NvmeTier
from kvd.storage.nvme.ranking import Ranking
from kvd.storage.quota import Share
from kvd.storage.reuse import AGES
from kvd.storage.worth import KINDS, PINNED, TRAITS, trait
from tests.harness import eventually
from tests.nvme_folder import LENGTH, MIB, reopened
from tests.tier_contract import Sample, get, held, put, sample

LOVED, PLAIN = TRAITS + trait(5, 0, False), trait(5, 40, False)


def judged(loved: int) -> list[float]:
    """Pages of one kind are worth a hundred times the others, whatever their age."""
    return [100.0 if line // AGES == loved else 1.0 for line in range(KINDS * AGES)]


def of_kind(number: int, kind: int) -> Sample:
    what = sample(number, LENGTH)
    return Sample(what.page._replace(kind=kind), what.data)


def names(*samples: Sample) -> set[bytes]:
    return {what.page.name for what in samples}


def test_what_is_worth_least_leaves_first_though_it_is_newer(tmp_path: Path) -> None:
    with reopened(tmp_path, 2 * MIB) as tier:
        tier.judge(judged(LOVED))
        loved = [of_kind(n, LOVED) for n in range(8)]
        put(tier, *loved)
        for at in range(100, 300, 4):
            assert all(put(tier, *[of_kind(n, PLAIN) for n in range(at, at + 4)]))
        assert names(*loved) <= held(tier)
        assert tier.counters["evicted"] > 100


def test_what_is_known_of_a_page_outlives_a_restart(tmp_path: Path) -> None:
    loved = [of_kind(n, LOVED) for n in range(8)]
    with reopened(tmp_path, 2 * MIB) as tier:
        put(tier, *loved, *[of_kind(n, PLAIN) for n in range(50, 58)])
    with reopened(tmp_path, 2 * MIB) as tier:
        tier.judge(judged(LOVED))
        for at in range(100, 200, 4):
            put(tier, *[of_kind(n, PLAIN) for n in range(at, at + 4)])
        assert names(*loved) <= held(tier)
        assert [what and what.page.kind for what in get(tier, *loved)] == [LOVED] * 8


def test_a_use_elsewhere_counts(tmp_path: Path) -> None:
    with reopened(tmp_path, 2 * MIB) as tier:
        tier.judge(judged(LOVED))
        often = [of_kind(n, PLAIN) for n in range(8)]
        put(tier, *often)
        tier.used([(what.page.name, LOVED) for what in often] + [(bytes(48), LOVED)])
        for at in range(100, 300, 4):
            put(tier, *[of_kind(n, PLAIN) for n in range(at, at + 4)])
        assert names(*often) <= held(tier)


def test_a_full_tier_says_below_what_a_page_is_not_worth_storing(tmp_path: Path) -> None:
    with reopened(tmp_path, 2 * MIB) as tier:
        tier.judge(judged(LOVED))
        assert tier.floor == 0.0, "there is room"
        for at in range(100, 300, 4):
            put(tier, *[of_kind(n, LOVED) for n in range(at, at + 4)])
        assert tier.floor == 100.0
        tier.remove(list(held(tier))[:30])
        assert tier.floor == 0.0, "there is room again"


def test_pages_unused_for_their_time_to_live_leave(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path / "tier", 8 * MIB, 2 * MIB, ttl_s=1.0)
    try:
        old, used = [of_kind(n, PLAIN) for n in range(8)], [of_kind(n, PLAIN) for n in range(20, 28)]
        put(tier, *old, *used)
        left: set[bytes] = set()

        def gone() -> bool:
            tier.used([(what.page.name, PLAIN) for what in used])
            tier.tend()
            left.update(tier.news().left)
            return names(*old) <= left

        eventually(gone, 10)
        assert held(tier) == names(*used)
        assert tier.counters["expired"] == len(old)
        assert tier.faults() == []
    finally:
        tier.close()


def test_the_order_is_density_then_age_then_depth() -> None:
    import numpy as np

    ranking, now = Ranking(judged(LOVED)), int(1000 * time.time())
    shallow, deep = trait(0, 0, False), trait(100, 0, False)
    pages = [(LOVED, now - 10**9), (PLAIN, now - 5000), (shallow, now - 9000), (deep, now - 9000), (PLAIN, now)]
    kinds, times = (np.array(column) for column in zip(*pages, strict=True))
    order = ranking.order(kinds.astype(np.uint8), times, now)
    assert np.argsort(order).tolist() == [3, 2, 1, 4, 0]


def test_a_lesson_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="3 densities instead of"):
        Ranking([1.0, 2.0, 3.0])


def test_pinned_pages_stay_until_they_are_unpinned(tmp_path: Path) -> None:
    with reopened(tmp_path, 2 * MIB) as tier:
        kept, told = [of_kind(n, PINNED) for n in range(4)], [of_kind(n, PLAIN) for n in range(20, 24)]
        put(tier, *kept, *told)
        tier.used([(what.page.name, PINNED) for what in told])
        for at in range(100, 300, 4):
            assert all(put(tier, *[of_kind(n, LOVED) for n in range(at, at + 4)]))
        assert names(*kept, *told) <= held(tier)
        tier.used([(what.page.name, PLAIN) for what in kept + told])
        for at in range(300, 500, 4):
            put(tier, *[of_kind(n, LOVED) for n in range(at, at + 4)])
        assert not names(*kept, *told) & held(tier)
        assert tier.faults() == []


def test_a_pin_is_the_daemons_to_say_again_after_a_restart(tmp_path: Path) -> None:
    was, still = [of_kind(n, PINNED) for n in range(4)], [of_kind(n, PINNED) for n in range(20, 24)]
    with reopened(tmp_path, 2 * MIB) as tier:
        put(tier, *was, *still)
    with reopened(tmp_path, 2 * MIB) as tier:
        tier.used([(what.page.name, PINNED) for what in still])
        for at in range(100, 300, 4):
            assert all(put(tier, *[of_kind(n, LOVED) for n in range(at, at + 4)]))
        assert names(*still) <= held(tier)
        assert not names(*was) & held(tier), "nobody has pinned them since"


def test_a_tier_full_of_pins_refuses_and_goes_on(tmp_path: Path) -> None:
    with reopened(tmp_path, 2 * MIB) as tier:
        for at in range(0, 60, 4):
            put(tier, *[of_kind(n, PINNED) for n in range(at, at + 4)])
        assert not any(put(tier, *[of_kind(n, LOVED) for n in range(100, 104)]))
        assert tier.counters["no_room"] > 0
        assert tier.faults() == []


def of_tenant(number: int, namespace: bytes) -> Sample:
    what = sample(number, LENGTH)
    return Sample(what.page._replace(namespace=namespace), what.data)


def test_tenants_keep_their_reserve_and_lose_above_their_burst(tmp_path: Path) -> None:
    small, greedy, other = (bytes([n]) * 16 for n in (1, 2, 3))
    slot = 61440  # of LENGTH bytes
    shares = {"small": Share(6 * slot), "greedy": Share(0, 8 * slot)}
    tier = NvmeTier(tmp_path / "tier", 2 * MIB, 1 * MIB, shares=shares)
    try:
        tier.belongs(small, "small")
        tier.belongs(greedy, "greedy")
        put(tier, *[of_tenant(n, small) for n in range(10)])
        put(tier, *[of_tenant(n, greedy) for n in range(100, 120)])
        for at in range(200, 400, 2):
            assert all(put(tier, *[of_tenant(n, other) for n in range(at, at + 2)]))
        count = {space: sum(name[:16] == space for name in held(tier)) for space in (small, greedy, other)}
        assert count[small] == 6
        assert count[greedy] <= 8
        assert tier.held() == {"small": 6 * slot, "greedy": count[greedy] * slot}
        assert tier.faults() == []
    finally:
        tier.close()
