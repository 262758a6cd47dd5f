"""How fast a tier is, learnt from loads in plain time."""

from math import inf

import pytest

from kvd.daemon.speed import Disk

MB = 1_000_000


def test_a_tier_is_measured_while_it_is_busy_and_not_between() -> None:
    disk = Disk()
    for start in (10.0, 20.0, 30.0):
        for part in range(4):
            disk.begun(5 * MB, start)
            assert disk.on_the_way == 5 * MB * (part + 1)
        for part in range(4):
            disk.ended(5 * MB, 5 * MB, start + 0.01 * (part + 1))
    assert disk.on_the_way == 0
    assert 450 * MB < disk.bytes_per_s < 550 * MB


def test_small_loads_say_what_the_latency_is_and_large_ones_what_the_rate_is() -> None:
    disk = Disk()
    for size in (MB, 20 * MB, 2 * MB, 50 * MB):
        disk.observe(size, 0.05 + size / (200 * MB), 1.0)
    assert disk.latency_s == pytest.approx(0.05, rel=0.1)
    assert disk.bytes_per_s == pytest.approx(200 * MB, rel=0.1)


def test_a_tier_that_brings_nothing_for_long_is_late_until_something_comes() -> None:
    disk = Disk()
    disk.begun(10 * MB, 1.0)
    assert disk.late_at == inf, "who knows how long it takes"
    disk.ended(10 * MB, 10 * MB, 1.1)
    disk.begun(10 * MB, 2.0)
    assert disk.late_at == pytest.approx(2.0 + 0.3 + 0.5)
    disk.begun(90 * MB, 2.5)
    assert disk.late_at == pytest.approx(2.8), "what is asked later makes it no less late"
    disk.ended(10 * MB, 10 * MB, 2.7)
    assert disk.late_at == pytest.approx(2.7 + 2.7 + 0.5, rel=0.1), "it goes on: the rest has its time"
    disk.ended(90 * MB, 0, 3.0)
    assert disk.late_at == inf


def test_loads_that_follow_each_other_pay_the_latency_once() -> None:
    disk, now = Disk(), 1.0
    disk.begun(100 * MB, now)
    now += 0.2
    for _ in range(20):
        now += 0.05
        disk.ended(5 * MB, 5 * MB, now)
    assert disk.bytes_per_s == pytest.approx(100 * MB, rel=0.1)
    assert disk.latency_s == pytest.approx(0.2, rel=0.2)


def test_equal_loads_are_explained_by_the_rate() -> None:
    disk = Disk()
    for _ in range(5):
        disk.observe(10 * MB, 0.1, 1.0)
    assert disk.latency_s + 10 * MB / disk.bytes_per_s == pytest.approx(0.1, rel=0.02)
    assert disk.latency_s < 0.02


def test_a_tier_that_became_slow_or_recovers_is_believed_after_a_few_loads() -> None:
    disk = Disk()
    for mb_per_s in (2000, 5, 2000):
        for size in (3, 10, 20):
            disk.observe(size * MB, size / mb_per_s, 1.0)
        assert disk.bytes_per_s == pytest.approx(mb_per_s * MB, rel=0.01)
        assert not disk.doubtful


def test_one_slow_load_on_a_fast_tier_changes_nothing_but_raises_doubt() -> None:
    disk = Disk()
    for _ in range(10):
        disk.observe(10 * MB, 0.005, 1.0)
    disk.observe(10 * MB, 1.0, 2.0)
    assert disk.bytes_per_s > 1900 * MB
    assert disk.doubtful
    disk.observe(10 * MB, 0.005, 3.0)
    assert not disk.doubtful


def test_what_did_not_come_is_no_measurement() -> None:
    disk = Disk()
    disk.begun(10 * MB, 1.0)
    disk.ended(10 * MB, 0, 2.0)
    assert not disk.known
    assert disk.on_the_way == 0
