"""Steering by knowledge: what becomes of a request, and what is learnt from its answer."""

import asyncio

import pytest

from kvd.router.knowledge import Manner
from kvd.router.policies.choice import Matched
from kvd.router.work import Work
from tests.router_world import (
    NONE,
    Table,
    answer,
    ask,
    chain,
    clock,
    event,
    ids,
    incoming,
    life,
    play,
    steering,
    whole,
)

# -- what becomes of it -----------------------------------------------------------------------------------


def test_a_stream_teaches_how_fast_its_worker_is(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        for number in range(5):
            choice = await steered.choose(ask(ids(1000, number)), NONE)
            answer(steered, choice, tokens=11, each_s=0.2)
        rates = table.rate
        assert (rates.prefill.observed, rates.decode.observed, rates.answer_tokens) == (5, 5, 11)
        assert rates.interval_s(1, 1000) == pytest.approx(0.2, rel=0.2)

    play(course())


def test_an_answer_in_one_piece_teaches_its_length_and_no_speed(table: Table) -> None:
    async def course() -> None:
        steered, loop = steering(table), clock()
        choice = await steered.choose(ask(ids(1000), stream=False), NONE)
        steered.sent(choice, loop.now)
        worker = choice.worker.name
        assert steered.load.at(worker, loop.now).queued.tokens == 1000
        loop.now += 10.0
        steered.tick(loop.now)
        load = steered.load.at(worker, loop.now)
        assert (load.queued.tokens, load.running) == (0, 1), "its prompt must be computed by now"
        steered.first_byte(choice, 200, loop.now)
        steered.progressed(choice, whole(64, 30), loop.now)
        steered.finished(choice, "answered", loop.now)
        rates = table.rate
        assert (rates.prefill.observed, rates.decode.observed, rates.answer_tokens) == (0, 0, 30)
        assert life(choice).made.actual_ttft_s is None
        assert steered.ledger.achieved == 64

    play(course())


def test_a_guessed_first_token_is_not_learnt_from_beside_a_streams(manner: Manner) -> None:
    table = Table(["w0"], manner)

    async def course() -> None:
        steered, loop = steering(table), clock()
        whole_one = await steered.choose(ask(ids(1000), stream=False), NONE)
        stream = await steered.choose(ask(ids(1000, 2)), NONE)
        for choice in (whole_one, stream):
            steered.sent(choice, loop.now)
        loop.now += 5.0
        steered.tick(loop.now)
        steered.first_byte(stream, 200, loop.now + 0.1)
        steered.progressed(stream, event(0), loop.now + 0.1)
        assert table.rate.prefill.observed == 0
        loop.now += 1.0
        answer(steered, await steered.choose(ask(ids(1000, 3)), NONE), each_s=0.2)
        assert table.rate.prefill.observed == 1
        assert table.rate.prompt_s(1000, 0) == pytest.approx(0.2, rel=0.01)

    play(course())


def test_what_is_loaded_from_tiers_is_not_learnt_as_computing(manner: Manner) -> None:
    class Tiered(Table):
        def matched(self, *_: object) -> dict[str, Matched]:
            return {"w0": Matched(gpu=16, ram=992)}

    table = Tiered(["w0"], manner)
    table.rate.token_bytes = 1_000_000
    table.rate.told("ram", 0.0, 1e11)

    async def course() -> None:
        steered, loop = steering(table), clock()
        for number in range(20):
            choice = await steered.choose(ask(ids(1000, number)), NONE)
            assert steered.load.at("w0", loop.now).queued == Work.of(1000, 992)
            answer(steered, choice, cached=992, each_s=976 * 1e6 / 1e11 + 0.02)
        assert table.rate.prompt_s(1000, 992) == pytest.approx(0.02, rel=0.01)

    play(course())


def test_the_ledger_says_what_was_lost(table: Table) -> None:
    table.blocks["w0"].update(chain(table, ids(1000)))

    async def course() -> None:
        steered = steering(table)
        for number, cached in enumerate((992, 500)):
            choice = await steered.choose(ask(ids(1000, last=number), stream=False), NONE)
            if number:
                table.blocks["w0"].clear()  # before it was computed
            answer(steered, choice, cached=cached)
        ledger = steered.ledger
        assert (ledger.requests, ledger.available, ledger.achieved) == (2, 2 * 992, 992 + 500)
        assert ledger.lost["eviction"] == 492

    play(course())


def test_of_a_length_that_is_a_guess_no_part_is_said_to_be_cached(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        for known in (True, False):
            table.manners = table.manners if known else {"w0": None, "w1": None}
            answer(steered, await steered.choose(ask(ids(100)), NONE), cached=20_000)
            made = steered.decisions.last(1)[0]
            assert (made.cached, made.outcome) == (20_000 if known else None, "answered")

    play(course())


def test_a_second_attempt_goes_elsewhere_and_says_so(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        request = ask(ids(1000))
        first = await steered.choose(request, NONE)
        steered.sent(first, 100.0)
        steered.finished(first, "no_answer", 100.5)
        second = await steered.choose(request, frozenset({first.worker.name}))
        assert second.worker.name != first.worker.name
        answer(steered, second, cached=0)
        newest, older = steered.decisions.last(2)
        assert (older.outcome, older.tried, older.ended_at) == ("no_answer", (), 100.5)
        assert (newest.outcome, newest.tried) == ("answered", (first.worker.name,))
        assert steered.decisions.find("r") is newest
        assert steered.ledger.requests == 0, "it would find itself among those who asked before"
        assert steered.predicted.match(first.worker.name, life(first).chain, 101.0) == 0

    play(course())


def test_an_error_is_no_answer_to_learn_from(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        choice = await steered.choose(ask(ids(100)), NONE)
        steered.sent(choice, 100.0)
        steered.first_byte(choice, 400, 100.1)
        steered.progressed(choice, b'data: {"error": "no"}\n\n', 100.1)
        steered.finished(choice, "answered", 100.1)
        assert life(choice).made.outcome == "status 400"
        assert (table.rate.prefill.observed, steered.ledger.given_up) == (0, 1)
        assert steered.predicted.match(choice.worker.name, life(choice).chain, 100.1) == 0

    play(course())


def test_clients_that_give_the_same_id_are_told_apart(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        choices = [await steered.choose(ask(ids(100, number), request_id="same"), NONE) for number in range(3)]
        assert len(steered.load) == 3
        answer(steered, choices[1])
        assert len(steered.load) == 2
        assert [made.outcome for made in steered.decisions.last(3)] == ["", "answered", ""]
        for choice in (choices[0], choices[2]):
            answer(steered, choice)
        assert len(steered.load) == 0
        assert [made.outcome for made in steered.decisions.last(3)] == ["answered"] * 3

    play(course())


def test_who_leaves_while_its_tokens_are_made_leaves_nothing(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        for text in ("many words " * 3000, "more words " * 50_000):  # in the encoder's thread; all of it in one
            task = asyncio.create_task(steered.choose(incoming({"text": text}), NONE))
            await asyncio.sleep(0)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (len(steered.load), len(steered.ledger._open), steered.decisions.total) == (0, 0, 0)
        assert steered.describe()['running{worker="w0"}'] == 0
        choice = await steered.choose(incoming({"text": "many words " * 3000}), NONE)
        assert life(choice).prompt.exact

    play(course())


def test_a_worker_that_is_gone_is_forgotten_with_all_that_is_there(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        choice = await steered.choose(ask(ids(1000)), NONE)
        steered.sent(choice, 100.0)
        steered.leave(choice.worker.name)
        assert len(steered.load) == 0
        steered.first_byte(choice, 200, 100.1)
        steered.progressed(choice, event(), 100.1)
        steered.finished(choice, "cut", 100.2)
        assert steered.predicted.match(choice.worker.name, life(choice).chain, 100.2) == 0

    play(course())


def test_what_does_not_generate_is_not_steered(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        request = incoming({}, "/get_model_info")
        request.routed = False
        choice = await steered.choose(request, NONE)
        assert choice.note is None
        steered.sent(choice, 100.0)
        steered.first_byte(choice, 200, 100.0)
        steered.progressed(choice, b"{}", 100.0)
        steered.finished(choice, "answered", 100.0)
        assert steered.decisions.total == 0

    play(course())
