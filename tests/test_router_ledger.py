"""What was decided and what was lost: every lost token once, every decision explained, memory bounded."""

from copy import deepcopy

from hypothesis import given
from hypothesis import strategies as st

from kvd.router.decisions import MOST_SHOWN, Decisions, matched_words, why
from kvd.router.ledger import MOST_OPEN, Ledger, settle
from kvd.router.load import Load
from kvd.router.policies.choice import Candidate, Choice, Matched, Scored
from kvd.router.seen import Seen
from kvd.router.work import Request


def request(name: str = "r1", tokens: int = 4096) -> Request:
    return Request(name, tokens, range(tokens // 512), 512)


def scored(worker: str, cost: float, ttft_s: float | None = None, **terms: float) -> Scored:
    return Scored(Candidate(worker, Matched(), Load()), cost, terms, ttft_s)


# -- the ledger -------------------------------------------------------------------------------------------


def test_a_full_hit_loses_nothing() -> None:
    assert settle(1024, 1024, Matched(gpu=1024), cached=1024, still=1024) == (1024, 1024, {})


def test_each_loss_has_its_name() -> None:
    everywhere_gone = settle(1024, 0, Matched(), cached=0, still=0)
    assert everywhere_gone.lost == {"eviction": 1024}
    elsewhere = settle(1024, 1024, Matched(gpu=256), cached=256, still=256)
    assert elsewhere.lost == {"routing": 768}
    not_loaded = settle(1024, 1024, Matched(gpu=256, nvme=1024), cached=256, still=256)
    assert not_loaded.lost == {"gate": 768}
    left_meanwhile = settle(1024, 1024, Matched(gpu=1024), cached=512, still=512)
    assert left_meanwhile.lost == {"eviction": 512}
    never_was_there = settle(1024, 1024, Matched(gpu=1024), cached=512, still=1024)
    assert never_was_there.lost == {"lag": 512}
    did_not_come = settle(1024, 0, Matched(expected=1024), cached=0, still=1024)
    assert did_not_come.lost == {"lag": 1024}


def test_what_was_cached_and_not_foreseen_was_available() -> None:
    assert settle(0, 0, Matched(), cached=512, still=512) == (512, 512, {})


tokens = st.integers(0, 8192)


@given(tokens, tokens, st.builds(Matched, tokens, tokens, tokens, tokens, tokens), tokens, tokens)
def test_every_lost_token_is_lost_once(seen: int, best: int, chosen: Matched, cached: int, still: int) -> None:
    settled = settle(seen, best, chosen, cached, still)
    assert settled.available == settled.achieved + sum(settled.lost.values())
    assert all(count > 0 for count in settled.lost.values())


def test_totals_count_answers_and_give_up_the_rest() -> None:
    ledger = Ledger()
    ledger.sent("a", 1024, 1024, Matched(gpu=256))
    ledger.sent("b", 512, 512, Matched(gpu=512))
    ledger.sent("c", 512, 512, Matched(gpu=512))
    ledger.answered("a", 2048, 256, 256)
    ledger.answered("b", 600, 512, 512)
    ledger.dropped("c")
    assert ledger.answered("c", 600, 512, 512) is None
    assert (ledger.requests, ledger.given_up, ledger.tokens) == (2, 1, 2648)
    assert (ledger.available, ledger.achieved, ledger.lost["routing"]) == (1536, 768, 768)


def test_answers_that_never_come_are_given_up_in_turn() -> None:
    ledger = Ledger()
    for number in range(MOST_OPEN + 10):
        ledger.sent(str(number), 0, 0, Matched())
    assert ledger.given_up == 10
    assert ledger.answered("9", 100, 0, 0) is None
    assert ledger.answered("10", 100, 0, 0) is not None


# -- what was seen ----------------------------------------------------------------------------------------


def leading(seen: Seen, chain: list[int]) -> int:
    """How many are found, and nothing is noted."""
    return deepcopy(seen).note(chain)


def test_blocks_are_seen_as_a_prefix() -> None:
    seen = Seen(1000)
    assert seen.note([1, 2, 3]) == 0
    assert leading(seen, [1, 2, 3, 4]) == 3
    assert leading(seen, [2, 3]) == 2
    assert leading(seen, [9, 1]) == 0
    assert seen.note([1, 2, 3, 4]) == 3
    assert seen.note([1, 2, 3, 4, 5]) == 4


def test_the_last_blocks_are_always_seen_and_new_ones_hardly_ever() -> None:
    seen = Seen(1000)
    for block in range(10_000):
        seen.note([block * 0x1234567 + 1])
        assert leading(seen, [max(0, block - 900) * 0x1234567 + 1]) == 1
    wrong = sum(leading(seen, [(1 << 60) + block * 977]) for block in range(10_000))
    assert wrong < 200
    assert leading(seen, [1]) == 0  # the first was forgotten long ago


# -- decisions --------------------------------------------------------------------------------------------


def test_a_decision_is_found_with_what_came_of_it() -> None:
    decisions = Decisions()
    choice = Choice("kvd", (scored("a", 0.5, 0.4, queue_s=0.1), scored("b", 0.9, 0.9, queue_s=0.5)))
    added = decisions.add(request(), choice, now=10.0)
    added.first_token(10.6)
    added.ended(12.0, "done", cached=512)
    made = decisions.find("r1")
    assert made is not None
    assert (made.worker, made.predicted_ttft_s, made.cached, made.outcome) == ("a", 0.4, 512, "done")
    assert made.actual_ttft_s is not None
    assert round(made.actual_ttft_s, 6) == 0.6
    assert why(made) == "a costs 0.400 s less than b (queue_s -0.400 s)"


def test_why_names_what_speaks_against_the_winner_too() -> None:
    ranked = (scored("a", 1.0, 1.0, queue_s=0.5, compute_s=0.5), scored("b", 2.0, 2.0, queue_s=0.0, compute_s=2.0))
    made = Decisions().add(request(), Choice("kvd", ranked), 0.0)
    assert why(made) == "a costs 1.000 s less than b (compute_s -1.500 s, queue_s +0.500 s)"


def test_why_without_a_rival_without_a_difference_and_in_other_units() -> None:
    decisions = Decisions()
    assert "only one" in why(decisions.add(request(), Choice("kvd", (scored("a", 1.0),)), 0.0))
    equal = decisions.add(request(), Choice("kvd", (scored("a", 1.0), scored("b", 1.0))), 0.0)
    assert "cost the same" in why(equal)
    blocks = decisions.add(request(), Choice("dynamo", (scored("a", 3.0, blocks=3), scored("b", 5.0, blocks=5))), 0.0)
    assert why(blocks) == "a costs 2 less than b (blocks -2)"


def test_decisions_are_bounded_and_the_newest_come_first() -> None:
    decisions = Decisions(most=3)
    many = Choice("kvd", tuple(scored(f"w{n}", float(n)) for n in range(100)))
    for number in range(5):
        decisions.add(request(f"r{number}"), many, float(number))
    assert (len(decisions), decisions.total) == (3, 5)
    assert [made.request for made in decisions.last(2)] == ["r4", "r3"]
    assert decisions.find("r1") is None
    made = decisions.find("r4")
    assert made is not None
    assert (len(made.ranked), made.candidates) == (MOST_SHOWN, 100)


def test_a_request_that_is_sent_again_keeps_both_decisions() -> None:
    decisions = Decisions(most=3)
    first = decisions.add(request(), Choice("kvd", (scored("a", 1.0),)), 0.0)
    second = decisions.add(request(), Choice("kvd", (scored("b", 1.0),)), 0.0, ("a",))
    second.first_token(1.0)
    found = decisions.find("r1")
    assert found is second
    assert (found.worker, found.actual_ttft_s, found.tried) == ("b", 1.0, ("a",))
    assert decisions.last(2) == [second, first]
    assert first.actual_ttft_s is None
    for number in range(2):
        decisions.add(request(f"x{number}"), Choice("kvd", (scored("c", 1.0),)), 2.0)
    assert decisions.find("r1") is found  # the first of the two has fallen out


def test_matched_tokens_in_words() -> None:
    assert matched_words(Matched(gpu=512, nvme=2048)) == "gpu 512, nvme 2048"
    assert matched_words(Matched()) == "nothing"
