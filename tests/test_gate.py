"""Load or recompute: the decision, in plain numbers."""

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from kvd.daemon.gate import PROBE_PAGES, STALE_AFTER_S, SURE, WAIT_S, WORDS, Prefill, Reason, decide
from kvd.daemon.speed import Disk

MB = 1_000_000
UNKNOWN = Prefill(0.0)


def measured(mb_per_s: float, on_the_way: int = 0, latency_s: float = 0.0) -> Disk:
    disk = Disk(mb_per_s * MB, latency_s, 100.0)
    disk.begun(on_the_way, 100.0)
    return disk


def rate(tokens_per_s: float) -> Prefill:
    return Prefill(1 / tokens_per_s)


def chosen(disk: Disk, wanted: int, prefill: Prefill, own: int = 0, before: int = 0) -> tuple[int, str]:
    """Of pages of 1 MB and 64 tokens."""
    decision = decide(disk, wanted, MB, 64, prefill, 100.0, before, own)
    return decision.pages, decision.reason


def test_every_reason_has_its_words() -> None:
    assert set(WORDS) == set(get_args(Reason))


def test_a_worker_that_has_computed_nothing_yet_gets_what_can_be_here_in_time() -> None:
    assert chosen(measured(2000), 100, UNKNOWN) == (100, "speed unknown")
    assert chosen(measured(10), 100, UNKNOWN) == (10, "late")
    assert chosen(Disk(), 100, UNKNOWN) == (100, "speed unknown")


def test_a_disk_that_nobody_has_measured_is_measured_beside_the_request() -> None:
    assert chosen(Disk(), 100, rate(1000)) == (0, "untried")
    assert decide(Disk(), 100, MB, 64, rate(1000), 100.0).probe == PROBE_PAGES
    assert decide(Disk(), 1, MB, 64, rate(1000), 100.0).probe == 1


def test_a_disk_slower_than_the_worker_is_not_asked() -> None:
    # 64 tokens a megabyte: 10 MB/s give 640 tokens a second
    assert chosen(measured(10), 5, rate(1000)) == (0, "slower")
    assert chosen(measured(10), 5, rate(640)) == (0, "slower"), "nothing is won at break-even"
    assert chosen(measured(10), 5, rate(500)) == (5, "pays")


def test_what_cannot_be_here_in_time_is_left_out() -> None:
    assert chosen(measured(10), 100, rate(100)) == (10 * WAIT_S, "late")
    assert decide(measured(10), 100, MB, 64, rate(100), 100.0, wait_s=1.75).pages == 17
    assert chosen(measured(10, 4 * MB), 100, rate(10)) == (6 * WAIT_S, "late")
    assert chosen(measured(10, 40 * MB), 100, rate(10)) == (0, "late")


def test_what_is_on_its_way_already_comes_first() -> None:
    # a page saves 64 ms and costs 10, the queue costs 500: it takes 13 pages until 500 + 130 <= 0.8 * 832
    assert chosen(measured(100, 50 * MB), 12, rate(1000)) == (0, "queue")
    assert chosen(measured(100, 50 * MB), 13, rate(1000)) == (13, "pays")


def test_a_tier_that_is_silent_though_it_was_asked_is_not_waited_for() -> None:
    disk = measured(1000, 10 * MB)
    assert decide(disk, 10, MB, 64, rate(1000), 100.5).reason == "pays"
    silent = decide(disk, 10, MB, 64, rate(1000), 100.6)
    assert (silent.pages, silent.probe, silent.reason) == (0, 0, "silent")
    disk.ended(10 * MB, 10 * MB, 101.0)
    assert decide(disk, 10, MB, 64, rate(1000), 101.0).reason == "slower", "it answers, and this is how fast it is"


def test_the_second_half_of_a_long_prefix_does_not_wait_for_the_first_twice() -> None:
    assert chosen(measured(100, 90 * MB), 90, rate(1000)) == (0, "queue")
    assert chosen(measured(100, 90 * MB), 90, rate(1000), own=90 * MB) == (90, "pays")


def test_a_far_tier_is_not_asked_for_little() -> None:
    assert chosen(measured(1000, latency_s=0.1), 1, rate(1000)) == (0, "slower")
    assert chosen(measured(1000, latency_s=0.1), 10, rate(1000)) == (10, "pays")


def test_attention_makes_a_late_prefix_dearer_to_compute() -> None:
    worker = Prefill(1e-4, pair_s=1e-8)
    assert chosen(measured(100), 10, worker, before=0) == (0, "slower")
    assert chosen(measured(100), 10, worker, before=32_000) == (10, "pays")


def test_where_having_tokens_costs_as_much_as_computing_them_nothing_is_loaded() -> None:
    assert chosen(measured(2000), 10, Prefill(0.004, cached_s=0.004)) == (0, "no use")
    assert chosen(measured(2000), 10, Prefill(0.004, cached_s=0.009)) == (0, "no use")


def test_a_measurement_that_forbids_goes_stale_and_is_repeated_beside_the_request() -> None:
    slow = measured(1)
    refused = decide(slow, 5, MB, 64, rate(1000), 100.0)
    assert (refused.pages, refused.wanted, refused.disk_bytes_per_s, refused.probe) == (0, 5, MB, 0)
    later = decide(slow, 5, MB, 64, rate(1000), 101.0 + STALE_AFTER_S)
    assert (later.pages, later.probe, later.reason) == (0, PROBE_PAGES, "stale")
    assert decide(measured(100), 5, MB, 64, rate(1000), 101.0 + STALE_AFTER_S).probe == 0


def test_the_cpu_worker_of_the_benchmark() -> None:
    # SmolLM2-135M: 64 tokens are 2.9 MB; 250 tokens/s, and a token that is had costs a quarter of one that is not
    page, worker = 64 * 46_080, Prefill(0.004, cached_s=0.001)
    assert [decide(measured(speed), 6, page, 64, worker, 100.0).pages for speed in (5, 20, 200)] == [0, 6, 6]
    assert decide(measured(200), 22, page, 64, worker, 100.0).pages == 22


@given(
    st.integers(0, 10_000), st.integers(1, 64 * MB), st.integers(1, 4096), st.floats(1, 1e6),
    st.floats(0.01, 1e5), st.integers(0, 10**10), st.floats(0, 1.0), st.floats(0, 1e-6), st.integers(0, 100_000),
)  # fmt: skip
def test_it_never_costs_more_than_computing(
    wanted: int, page_bytes: int, tokens: int, speed: float, mb_per_s: float, queue: int, latency_s: float,
    pair_s: float, before: int,
) -> None:  # fmt: skip
    worker = Prefill(1 / speed, pair_s, 0.3 / speed)
    decision = decide(measured(mb_per_s, queue, latency_s), wanted, page_bytes, tokens, worker, 100.0, before)
    assert 0 <= decision.pages <= wanted
    if decision.pages:
        load_s = latency_s + (queue + decision.pages * page_bytes) / (mb_per_s * MB)
        assert load_s <= WAIT_S * 1.001
        assert load_s <= SURE * worker.saved_s(before, decision.pages * tokens) * 1.001
