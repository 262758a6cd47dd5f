"""Load or recompute: the decision, in plain numbers."""

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from kvd.daemon.gate import STALE_AFTER_S, WAIT_S, WORDS, Disk, Reason, decide

MB = 1_000_000


def measured(mb_per_s: float, on_the_way: int = 0) -> Disk:
    disk = Disk()
    disk.begun(10 * MB, 100.0 - 10 / mb_per_s)
    disk.ended(10 * MB, 10 * MB, 100.0)
    disk.begun(on_the_way, 100.0)
    return disk


def chosen(disk: Disk, wanted: int, prefill_tokens_per_s: float) -> tuple[int, str]:
    """Of pages of 1 MB and 64 tokens."""
    decision = decide(disk, wanted, MB, 64, prefill_tokens_per_s, 100.0)
    return decision.pages, decision.reason


def test_every_reason_has_its_words() -> None:
    assert set(WORDS) == set(get_args(Reason))


def test_what_was_never_measured_does_not_forbid() -> None:
    assert chosen(Disk(), 100, 1000.0) == (100, "untried")
    assert chosen(measured(2000), 100, 0.0) == (100, "speed unknown")


def test_a_disk_slower_than_the_worker_is_not_asked() -> None:
    # 64 tokens a megabyte: 10 MB/s give 640 tokens a second
    assert chosen(measured(10), 5, 1000.0) == (0, "slower")
    assert chosen(measured(10), 5, 500.0) == (5, "pays")


def test_what_cannot_be_here_in_time_is_left_out() -> None:
    assert chosen(measured(10), 100, 100.0) == (10 * WAIT_S, "late")
    assert chosen(measured(10, 4 * MB), 100, 10.0) == (6 * WAIT_S, "late")
    assert chosen(measured(10), 100, 0.0) == (10 * WAIT_S, "late")


def test_what_is_on_its_way_already_comes_first() -> None:
    # one page gains 64 - 10 ms, the queue costs 500 ms: ten pages are too few to be worth it
    assert chosen(measured(100, 50 * MB), 9, 1000.0) == (0, "queue")
    assert chosen(measured(100, 50 * MB), 10, 1000.0) == (10, "pays")
    assert chosen(measured(10, 40 * MB), 100, 10.0) == (0, "queue")


def test_a_measurement_that_forbids_goes_stale() -> None:
    slow = measured(1)
    refused = decide(slow, 5, MB, 64, 1000.0, 100.0)
    assert (refused.pages, refused.wanted, refused.disk_bytes_per_s) == (0, 5, MB)
    later = decide(slow, 5, MB, 64, 1000.0, 101.0 + STALE_AFTER_S)
    assert (later.pages, later.reason) == (5, "stale")


def test_a_disk_that_recovers_is_believed_again() -> None:
    mended = measured(1)
    for _ in range(20):
        mended.begun(10 * MB, 99.99)
        mended.ended(10 * MB, 10 * MB, 100.0)
    assert decide(mended, 5, MB, 64, 1000.0, 100.0).pages == 5


def test_the_disk_is_measured_while_it_is_busy_and_not_between() -> None:
    disk = Disk()
    for start in (10.0, 20.0, 30.0):
        for part in range(4):
            disk.begun(5 * MB, start)
            assert disk.on_the_way == 5 * MB * (part + 1)
        for part in range(4):
            disk.ended(5 * MB, 5 * MB, start + 0.01 * (part + 1))
    assert disk.on_the_way == 0
    assert 450 * MB < disk.bytes_per_s < 550 * MB


def test_a_small_load_says_little_about_the_disk() -> None:
    disk = Disk()
    disk.begun(100 * MB, 1.0)
    disk.ended(100 * MB, 100 * MB, 1.1)
    disk.begun(4096, 2.0)
    disk.ended(4096, 4096, 2.001)
    assert disk.bytes_per_s > 990 * MB


@given(
    st.integers(0, 10_000), st.integers(1, 64 * MB), st.integers(0, 4096), st.floats(0, 1e6),
    st.floats(0.01, 1e5), st.integers(0, 10**10),
)  # fmt: skip
def test_it_never_costs_more_than_computing(
    wanted: int, page_bytes: int, tokens: int, prefill: float, mb_per_s: float, queue: int
) -> None:
    decision = decide(measured(mb_per_s, queue), wanted, page_bytes, tokens, prefill, 100.0)
    assert 0 <= decision.pages <= wanted
    if decision.pages:
        load_s = (queue + decision.pages * page_bytes) / (mb_per_s * MB)
        assert load_s <= WAIT_S * 1.001
        if prefill and tokens:
            assert load_s <= decision.pages * tokens / prefill * 1.001
