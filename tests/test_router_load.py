"""What workers have to do: our own requests exactly, others' as engines report them, blocks that are on their way."""

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvd.router.activeload import STALE_REPORT_S, ActiveLoad
from kvd.router.cost import room_s
from kvd.router.flights import MOST_LEFT
from kvd.router.load import Load, Report
from kvd.router.predicted import EVENTS_S, Predicted
from kvd.router.rates import Rates
from kvd.router.work import NO_WORK, Work


def report(at: float, running: int = 0, waiting: int = 0, tokens: int = 0, used: int = 0) -> Report:
    return Report(at, running, waiting, tokens, used, 10_000)


# -- our own requests -------------------------------------------------------------------------------------


def test_a_request_waits_runs_and_is_gone() -> None:
    load = ActiveLoad()
    load.sent("a", "w", 1000, 400, now=1.0)
    load.sent("b", "w", 500, 0, now=1.5)
    assert load.at("w", 2.0) == Load(Work(2, 1100, 600 * 700 + 500 * 250), Work(1, 600, 600 * 700), 1.0)
    load.first_token("a", 3.0)
    load.progressed("a", 20)
    assert load.at("w", 3.25) == Load(Work(1, 500, 500 * 250), Work(1, 500, 500 * 250), 3.0, 1, 1020, None, 1020)
    load.finished("a", 4.0)
    load.first_token("b", 4.0)
    load.finished("b", 5.0)
    assert load.at("w", 5.0) == Load()
    assert len(load) == 0


def test_a_cached_prompt_still_computes_its_last_token() -> None:
    assert Work.of(512, 512) == Work(1, 1, 511.5)


def test_what_is_said_of_unknown_requests_changes_nothing() -> None:
    load = ActiveLoad()
    assert load.first_token("x", 1.0) is None
    load.progressed("x", 5)
    load.finished("x", 1.0)
    assert load.at("w", 1.0) == Load()


def test_a_request_that_is_sent_again_is_counted_where_it_went_last() -> None:
    load = ActiveLoad()
    load.sent("a", "w", 100, 0, 1.0)
    load.sent("a", "v", 100, 0, 2.0)
    assert load.at("w", 2.0) == Load()
    assert load.at("v", 2.0).queued.tokens == 100


def test_a_worker_that_has_gone_takes_its_requests_along() -> None:
    load = ActiveLoad()
    load.sent("a", "w", 100, 0, 1.0)
    load.forget("w")
    load.finished("a", 2.0)
    assert len(load) == 0
    assert load.at("w", 2.0) == Load()


def test_prefill_without_gaps_tells_how_fast_a_worker_is() -> None:
    load = ActiveLoad()
    for at, request in enumerate("abc"):
        load.sent(request, "w", 1000, 0, now=at / 100)
    assert load.first_token("a", 0.1) is None  # too short to say much
    assert load.first_token("b", 0.2) is None
    served = load.first_token("c", 0.3, cached=500)
    assert served is not None
    assert served.work == Work(3, 2500, 2 * 500_000 + 500 * 750)
    assert abs(served.seconds - 0.3) < 1e-9
    load.sent("d", "w", 1000, 0, now=9.0)
    alone = load.first_token("d", 9.05)  # the idle time before is not counted
    assert alone is not None
    assert abs(alone.seconds - 0.05) < 1e-9


def test_loading_from_tiers_is_no_prefill() -> None:
    load = ActiveLoad()
    for at, (cached, seconds) in enumerate([(30_000, 0.1), (15_000, 0.25), (0, 0.4), (None, 0.1)]):
        load.sent("a", "w", 32_000, 30_000, now=at, load_s=0.3, loaded=30_000)
        assert load.at("w", at).queued == Work.of(32_000, 30_000)
        served = load.first_token("a", at + 0.4, cached)
        assert served is not None
        assert served.work == Work.of(32_000, 30_000 if cached is None else cached)
        assert abs(served.seconds - seconds) < 1e-9, "what the engine computed it did not load"


def test_loads_of_several_prompts_say_nothing_where_they_are_most_of_the_time() -> None:
    load = ActiveLoad()
    for load_s, learnt in ((0.3, False), (0.1, True)):
        for request in "ab":
            load.sent(request, "w", 32_000, 30_000, now=0.0, load_s=load_s, loaded=30_000)
        assert load.first_token("a", 0.5) is None
        served = load.first_token("b", 1.0)  # may have been loaded while the other was computed, or in one step
        assert (served is not None) is learnt
    assert served is not None
    assert abs(served.seconds - 0.8) < 1e-9


def test_what_is_guessed_says_nothing_of_speed_nor_does_what_comes_right_after() -> None:
    load = ActiveLoad()
    for request in "abc":
        load.sent(request, "w", 1000, 0, now=0.0)
    assert load.first_token("a", 5.0, guessed=True) is None
    assert load.first_token("b", 10.0) is None, "nobody knows when it was begun"
    served = load.first_token("c", 10.25)
    assert served is not None
    assert served == (Work.of(1000, 0), 0.25)
    assert (load.at("w", 11.0).queued, load.at("w", 11.0).running) == (NO_WORK, 3)


# -- what engines report ----------------------------------------------------------------------------------


def test_others_requests_are_what_a_report_has_more_than_ours() -> None:
    load = ActiveLoad()
    load.sent("a", "w", 1000, 0, now=1.0)
    load.reported("w", report(2.0, running=2, waiting=3, tokens=3000, used=5000))
    load.sent("b", "w", 500, 0, now=2.5)
    now = load.at("w", 3.0)
    assert (now.queued.prompts, now.queued.tokens, now.running) == (4, 3500, 2)
    assert now.free_tokens == 10_000 - 5000 - 3000 - 500  # who waits will take room too
    load.first_token("a", 3.0)
    now = load.at("w", 3.0)
    assert (now.queued.prompts, now.queued.tokens, now.running) == (3, 2500, 3)


def test_what_a_report_says_of_our_own_prompts_adds_nothing_to_what_we_know() -> None:
    load = ActiveLoad()
    load.sent("turn1", "w", 4000, 0, now=1.0)
    load.sent("turn2", "w", 5000, 4000, now=1.5)  # the first brings what it needs, which the engine does not foresee
    load.reported("w", report(2.0, waiting=2, tokens=9000))
    assert load.at("w", 2.0).queued == Work.of(4000, 0).plus(Work.of(5000, 4000))
    load.reported("w", report(3.0, waiting=3, tokens=12_000))  # and one that is not ours, of the same length at most
    assert load.at("w", 3.0).queued.tokens == 5000 + 4000


def test_prompts_that_wait_take_room_as_far_as_those_that_run_shared_none_of_theirs() -> None:
    load = ActiveLoad()
    for request in "abcd":
        load.sent(request, "w", 1000, 0, now=1.0)
        load.first_token(request, 2.0)
    load.reported("w", report(3.0, running=4, used=2000))  # half of what they have is common to them
    assert load.at("w", 3.0).free_tokens == 8000
    load.sent("e", "w", 3000, 2900, now=3.5)
    assert load.at("w", 4.0).free_tokens == 8000 - 1500
    load.progressed("e", 100)
    load.first_token("e", 4.5)
    assert load.at("w", 4.5).free_tokens == 8000 - 1550
    assert load.at("w", 4.5).held_tokens == load.at("w", 4.5).context_tokens // 2
    load.finished("a", 5.0)
    assert load.at("w", 5.0).free_tokens == 8000 - 1550 + 500, "what the others use too stays"


def test_an_engine_that_is_ahead_of_what_we_heard_is_believed_about_what_it_had() -> None:
    load = ActiveLoad()
    load.sent("a", "w", 1000, 0, now=1.0)
    load.reported("w", report(2.0, running=1, waiting=0, tokens=0))  # its first token is on the way to us
    load.sent("b", "w", 300, 0, now=2.5)
    now = load.at("w", 2.5)
    assert (now.queued.prompts, now.queued.tokens, now.running) == (1, 300, 1)
    load.first_token("a", 2.6)
    now = load.at("w", 2.6)
    assert (now.queued.prompts, now.queued.tokens, now.running) == (1, 300, 1)


def test_a_long_prompt_that_is_half_computed_waits_for_its_other_half_only() -> None:
    load = ActiveLoad()
    load.sent("a", "w", 100_000, 0, now=1.0)
    load.sent("b", "w", 50_000, 0, now=1.5)
    load.reported("w", report(3.0, waiting=2, tokens=80_000))
    there = load.at("w", 3.25)
    assert there.queued.tokens == 80_000
    assert there.head == Work(1, 30_000, 30_000 * 85_000)
    assert there.head_at == 3.0  # the report: what was done before is not in it
    load.first_token("a", 4.0)
    assert load.at("w", 4.0).queued == Work.of(50_000, 0)  # what was done of the first says nothing of the second


def test_a_late_report_is_compared_with_its_own_moment() -> None:
    load = ActiveLoad()
    load.sent("a", "w", 1000, 0, now=1.0)
    load.first_token("a", 2.0)
    load.finished("a", 3.0)
    load.reported("w", report(1.5, waiting=1, tokens=1000, used=1000))
    assert replace(load.at("w", 3.0), free_tokens=None) == Load()


def test_an_engine_that_does_not_say_its_memory_is_not_full() -> None:
    load = ActiveLoad()
    load.sent("a", "w", 100, 0, now=1.0)
    load.first_token("a", 1.1)
    load.reported("w", Report(2.0, 1, 0, 0, 0, 0))
    assert load.at("w", 2.0).free_tokens is None
    assert room_s(10_000, load.at("w", 2.0), Rates()) == 0.0


def test_old_reports_and_reports_out_of_order_do_not_count() -> None:
    load = ActiveLoad()
    load.reported("w", report(2.0, running=5))
    load.reported("w", report(1.0, running=9))
    assert load.at("w", 2.0).running == 5
    assert load.at("w", 2.1 + STALE_REPORT_S).running == 0


Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(st.sampled_from(("sent", "first", "grew", "done", "report")), st.integers(0, 7), st.integers(0, 2000)),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_nothing_is_ever_below_zero_and_everything_ends(steps: list[Step]) -> None:
    load, now = ActiveLoad(), 0.0
    for what, which, tokens in steps:
        now += 0.1
        name, worker = f"r{which}", f"w{which % 2}"
        if what == "sent":
            load.sent(name, worker, tokens + 1, tokens // 2, now)
        elif what == "first":
            load.first_token(name, now)
        elif what == "grew":
            load.progressed(name, tokens)
        elif what == "done":
            load.finished(name, now)
        else:
            load.reported(worker, report(now - 0.15, which, which, tokens, tokens))
        assert load.faults() == []
        for worker in ("w0", "w1"):
            there = load.at(worker, now)
            assert min(there.queued) >= 0
            assert there.running >= 0
            assert there.context_tokens >= 0
            assert there.free_tokens is None or 0 <= there.free_tokens <= 10_000
    for which in range(8):
        load.finished(f"r{which}", now)
    later = now + STALE_REPORT_S + 1
    assert load.at("w0", later) == load.at("w1", later) == Load()
    assert len(load) == 0


def test_memory_stays_bounded_over_many_requests() -> None:
    load = ActiveLoad()
    for number in range(5 * MOST_LEFT):
        load.sent(str(number), "w", 100, 0, float(number))
        load.first_token(str(number), number + 0.1)
        load.finished(str(number), number + 0.2)
    assert len(load) == 0
    assert len(load._workers["w"].left) == MOST_LEFT
    assert load.at("w", 1e9).queued == NO_WORK


def test_a_look_gives_the_same_load_until_something_happens_there() -> None:
    load = ActiveLoad()
    load.reported("w", report(0.5, used=100))
    load.sent("a", "w", 1000, 0, now=1.0)
    load.sent("b", "v", 1000, 0, now=1.0)
    seen = load.at("w", 1.5)
    load.first_token("b", 2.0)
    assert load.at("w", 2.0) is seen
    assert load.at("w", 0.6 + STALE_REPORT_S) is not seen, "the report is too old to be believed"
    for happens in (load.first_token, lambda name, now: load.progressed(name, 1), load.finished):
        seen = load.at("w", 3.0)
        happens("a", 3.0)
        assert load.at("w", 3.0) is not seen
    seen = load.at("w", 4.0)
    load.reported("w", report(3.5))
    assert load.at("w", 4.0) is not seen


# -- blocks on their way ----------------------------------------------------------------------------------


def test_siblings_of_a_request_that_was_just_sent_are_expected_there() -> None:
    predicted = Predicted()
    predicted.sent("a", "w", [1, 2, 3])
    assert predicted.match("w", [1, 2, 4], now=0.0) == 2
    assert predicted.match("v", [1, 2, 4], now=0.0) == 0


def test_predictions_end_when_events_must_have_come() -> None:
    predicted = Predicted()
    predicted.sent("a", "w", [1, 2, 3])
    predicted.sent("b", "w", [1, 2, 4])
    predicted.prefilled("a", "w", now=10.0)
    assert predicted.match("w", [1, 2, 3], now=10.0 + EVENTS_S / 2) == 3
    assert predicted.match("w", [1, 2, 3], now=10.0 + EVENTS_S) == 2  # the other still brings two of them
    predicted.ended("b", "w")
    assert predicted.match("w", [1], now=20.0) == 0


def test_predictions_are_bounded_and_go_with_their_worker() -> None:
    predicted = Predicted(most=100)
    for request in range(50):
        predicted.sent(str(request), "w", range(10 * request, 10 * request + 10))
    assert predicted.match("w", [0], now=0.0) == 0
    assert predicted.match("w", range(490, 500), now=0.0) == 10
    predicted.forget("w")
    assert predicted.match("w", [490], now=0.0) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("spe"), st.integers(0, 5), st.integers(0, 30)), max_size=60))
def test_predicted_blocks_are_all_forgotten_in_the_end(steps: list[tuple[str, int, int]]) -> None:
    predicted, now = Predicted(most=40), 0.0
    for what, which, block in steps:
        now += 0.5
        if what == "s":
            predicted.sent(str(which), "w", [block, block + 1, block])
        elif what == "p":
            predicted.prefilled(str(which), "w", now)
        else:
            predicted.ended(str(which), "w")
    for which in range(6):
        predicted.ended(str(which), "w")
    assert all(predicted.match("w", [block], now) == 0 for block in range(32))
