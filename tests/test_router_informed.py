"""Steering by knowledge: who gets a request, and that none is lost to what is not known."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from kvd.router.informed import Informed
from kvd.router.knowledge import Manner
from kvd.router.policies.named import POLICIES
from kvd.router.steering import Busy, Choice, Worker
from kvd.router.tokens.blocks import Scheme, hashes
from kvd.router.tokens.outcome import Namespace
from kvd.router.tokens.requests import CHAT, COMPLETIONS, GENERATE, Tokenised
from tests.router_world import (
    NONE,
    PAGE,
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
)

# -- who gets it ------------------------------------------------------------------------------------------


def test_a_matched_prefix_wins_where_load_is_equal(table: Table) -> None:
    table.blocks["w1"].update(chain(table, ids(1000)))

    async def course() -> None:
        steered = steering(table)
        for number in range(4):
            choice = await steered.choose(ask(ids(1000, last=number)), NONE)
            assert choice.worker.name == "w1"
            assert life(choice).matched.gpu == 992, "whole pages"
            answer(steered, choice)
        made = steered.decisions.last(1)[0]
        assert (made.worker, made.outcome, made.candidates) == ("w1", "answered", 2)
        assert made.actual_ttft_s == pytest.approx(0.1)

    play(course())


def test_siblings_of_a_burst_meet_before_any_event_tells_of_them(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        went: dict[int, set[str]] = {1: set(), 2: set()}
        for number in range(8):
            group = 1 + number % 2
            choice = await steered.choose(ask(ids(20_000, group, number)), NONE)
            went[group].add(choice.worker.name)
        assert [len(workers) for workers in went.values()] == [1, 1]
        assert went[1] != went[2]
        assert life(choice).matched.expected == 19_984

    play(course())


def test_chats_meet_by_their_text(table: Table) -> None:
    said = [{"role": "system", "content": "You are terse. " * 300}, {"role": "user", "content": "Hello?"}]

    async def course() -> None:
        steered = steering(table)
        first = await steered.choose(incoming({"messages": said, "stream": True}, CHAT), NONE)
        steered.sent(first, 100.0)
        steered.first_byte(first, 200, 100.1)
        steered.progressed(first, event(), 100.1)
        said[1] = {"role": "user", "content": "Goodbye?"}
        second = await steered.choose(incoming({"messages": said, "stream": True}, CHAT), NONE)
        assert first.worker.name == second.worker.name
        assert life(first).prompt.exact
        assert life(second).matched.expected > 0.9 * life(second).prompt.tokens

    play(course())


def test_who_waits_is_matched_by_what_is_known_when_its_turn_comes(table: Table) -> None:
    async def course() -> None:
        steered = steering(table, most_each=1)
        choices = [await steered.choose(ask(ids(100, number + 5)), NONE) for number in range(2)]
        waiting = asyncio.create_task(steered.choose(ask(ids(1000)), NONE))
        await asyncio.sleep(0)
        assert steered.describe()["waiting"] == 1
        table.blocks["w0"].update(chain(table, ids(1000)))
        answer(steered, next(each for each in choices if each.worker.name == "w0"))
        choice = await waiting
        assert (choice.worker.name, life(choice).matched.gpu) == ("w0", 992)

    play(course())


def test_a_request_goes_where_its_model_is(table: Table) -> None:
    table.models = {"w0": "small", "w1": "large"}

    async def course() -> None:
        steered = steering(table, most_each=2)
        for model, worker in (("small", "w0"), ("large", "w1"), ("small", "w0")):
            assert (await steered.choose(ask(ids(50), model=model), NONE)).worker.name == worker
        late = asyncio.create_task(steered.choose(ask(ids(50), model="small"), NONE))
        await asyncio.sleep(0)
        assert not late.done(), "its worker has two"
        large = await steered.choose(ask(ids(50), model="large"), NONE)
        assert large.worker.name == "w1", "nobody waits behind those who wait for others"
        steered.finished(large, "answered", 101.0)
        counts = msgspec.structs.replace(ask([], model="small"), path="/tokenize", routed=False)
        assert (await steered.choose(counts, NONE)).worker.name == "w0", "another model's tokenizer counts otherwise"
        unknown = await steered.choose(ask(ids(50), model="other"), NONE)
        assert unknown.worker.name == "w1", "any worker says that it has no such model"
        with pytest.raises(Busy):
            await steered.choose(ask(ids(50), model="small"), frozenset({"w0"}))
        late.cancel()

    play(course())


def test_another_workers_name_for_its_blocks_is_another_chain(table: Table, manner: Manner) -> None:
    wide = replace(manner, scheme=Scheme(4 * PAGE))
    table.manners["w1"] = wide
    prompt = ids(1000)
    table.blocks["w1"].update(
        manner.tokeniser.hashes(manner.tokeniser.tokenise(GENERATE, {"input_ids": prompt})[0], wide.scheme)
    )

    async def course() -> None:
        steered = steering(table)
        choice = await steered.choose(ask(prompt), NONE)
        assert (choice.worker.name, life(choice).matched.gpu) == ("w1", 960)
        again = await steered.choose(ask(prompt), frozenset({"w1"}))
        assert (again.worker.name, life(again).block_tokens) == ("w0", PAGE)

    play(course())


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_and_is_explained(table: Table, policy: str) -> None:
    async def course() -> None:
        steered = steering(table, policy)
        for number in range(20):
            choice = await steered.choose(ask(ids(200, number % 3), request_id=f"r{number}"), NONE)
            assert life(choice).made.policy == policy
            answer(steered, choice, cached=16)
        assert steered.decisions.total == 20
        assert steered.describe()["in_flight"] == 0

    play(course())


# -- who answers errors -----------------------------------------------------------------------------------


def short(steered: Informed, choice: Choice, status: int) -> None:
    """It is answered at once."""
    steered.sent(choice, clock().now)
    steered.first_byte(choice, status, clock().now)
    steered.finished(choice, "answered", clock().now)


async def answered(steered: Informed, status: int, requests: int, each_s: float = 0.1, worker: str = "w0") -> int:
    """How many of these requests went to that worker, which answers so at once; others take a while."""
    went, others = 0, []
    for number in range(requests):
        clock().now += each_s
        choice = await steered.choose(ask(ids(100, number + 1), now=clock().now), NONE)
        if choice.worker.name != worker:
            others.append(choice)
            if len(others) > 10:
                short(steered, others.pop(0), 200)
            continue
        went += 1
        short(steered, choice, status)
    for choice in others:
        short(steered, choice, 200)
    return went


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
@pytest.mark.parametrize("policy", ["kvd", "least_busy"])
def test_a_worker_that_answers_errors_at_once_does_not_draw_all_traffic(
    table: Table, policy: str, status: int
) -> None:
    async def course() -> None:
        steered = steering(table, policy)
        assert 3 <= await answered(steered, status, 600) <= 3 + 7 + 4, "a minute: 0.5 s, 1 s, ... 15 s"
        clock().now += 15.0
        assert await answered(steered, 200, 20) > 5, "it is well again"
        assert steered._loads["w0"].errors == 0

    play(course())


@pytest.mark.parametrize("status", [400, 422, 429])
def test_what_is_the_clients_fault_counts_against_no_worker(table: Table, status: int) -> None:
    async def course() -> None:
        steered = steering(table, "least_busy")
        assert await answered(steered, status, 100) > 50

    play(course())


def test_a_request_that_no_worker_can_do_takes_none_from_others(table: Table) -> None:
    async def course() -> None:
        steered = steering(table, "least_busy", most_waiting=1)
        for number in range(50):  # 25 at each
            short(steered, await steered.choose(ask(ids(100, number + 1)), NONE), 500)
        went = [await steered.choose(ask(ids(100, number + 1)), NONE) for number in range(4)]
        assert sorted(choice.worker.name for choice in went) == ["w0", "w0", "w1", "w1"], "both are in doubt"
        again = await steered.choose(ask(ids(100)), frozenset({"w0"}))
        assert again.worker.name == "w1"
        short(steered, again, 200)
        assert {(await steered.choose(ask(ids(100)), NONE)).worker.name for _ in range(4)} == {"w1"}

    play(course())


def test_the_only_worker_is_asked_whatever_it_answers(table: Table) -> None:
    del table.manners["w1"], table.blocks["w1"]

    async def course() -> None:
        steered = steering(table, most_waiting=1)
        assert await answered(steered, 500, 50, 0.0) == 50

    play(course())


def test_errors_among_answers_that_are_good_count_for_nothing(table: Table) -> None:
    async def course() -> None:
        steered = steering(table, "least_busy")
        for status in 20 * [500, 500, 200]:
            first, second = [await steered.choose(ask(ids(100)), NONE) for _ in range(2)]
            assert first.worker is not second.worker
            for choice in (first, second):
                short(steered, choice, status)

    play(course())


def test_an_error_is_no_sign_that_a_worker_is_back_and_a_404_of_what_does_not_generate_is_one(table: Table) -> None:
    async def course() -> None:
        steered = steering(table, "least_busy")
        load = steered._loads["w0"]
        unrouted = msgspec.structs.replace(ask([]), path="/nothing", routed=False)
        for _ in range(2):
            choice = await steered.choose(ask(ids(100)), frozenset({"w1"}))
            steered.finished(choice, "no_answer", clock().now)
            clock().now = load.rests_until
        short(steered, await steered.choose(ask(ids(100)), frozenset({"w1"})), 500)
        assert (load.failures, load.errors) == (2, 1)
        for _ in range(5):
            short(steered, await steered.choose(unrouted, frozenset({"w1"})), 404)
        assert (load.failures, load.errors) == (0, 1)
        short(steered, await steered.choose(unrouted, frozenset({"w1"})), 200)
        assert load.errors == 1, "its engine had no part in it"

    play(course())


def test_answers_to_what_was_sent_before_are_one_reason_to_doubt(table: Table) -> None:
    async def course() -> None:
        steered = steering(table, "least_busy")
        choices = [await steered.choose(ask(ids(100)), frozenset({"w1"})) for _ in range(100)]
        for choice in choices:
            short(steered, choice, 500)
        assert steered._loads["w0"].doubted_until == clock().now + 0.5

    play(course())


def test_names_of_workers_are_escaped_in_numbers(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        steered.join(Worker('a"b', "a", 1), True)
        assert 'running{worker="a\\"b"}' in steered.describe()

    play(course())


# -- what has no tokens -----------------------------------------------------------------------------------


def test_what_has_no_tokens_is_as_long_as_its_body_and_goes_by_load(table: Table) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:," + "x" * 100_000}}

    async def course() -> None:
        steered = steering(table)
        body = {"messages": [{"role": "user", "content": [image]}]}
        shown = await steered.choose(incoming(body, CHAT), NONE)
        embeds = await steered.choose(incoming({"input_embeds": [[0.5] * 1000]}), NONE)
        assert shown.worker.name != embeds.worker.name
        assert life(shown).prompt.tokens == 4096, "an image is not as long as its bytes"
        assert life(embeds).prompt.tokens == len(embeds.request.body) // 4 + 1
        table.manners = {"w0": None, "w1": None}
        plain = await steered.choose(ask(ids(100)), NONE)
        assert not life(plain).prompt.exact
        numbers = steered.describe()
        said = [made.unknown for made in steered.decisions.last(3)]
        assert said == ["no credit", "embeds: input_embeds", "multimodal: a part of type image_url"]
        for why in ("multimodal", "embeds", "no credit"):
            assert numbers[f'prompts_total{{tokens="{why}"}}'] == 1

    play(course())


def test_a_salted_prompt_is_looked_for_under_both_its_names(table: Table, manner: Manner) -> None:
    async def course() -> None:
        steered = steering(table)
        salted = await steered.choose(incoming({"input_ids": ids(100), "cache_salt": "s"}), NONE)
        naming = manner.scheme.stores(Namespace(cache_salt="s"))
        assert list(life(salted).prompt.stored[manner]) == hashes(ids(100), naming)
        assert list(life(salted).chain) == hashes(ids(100), manner.scheme.names(Namespace(cache_salt="s")))
        assert list(life(salted).chain) != life(salted).prompt.stored[manner]
        assert life(await steered.choose(ask(ids(100)), NONE)).prompt.stored == {}

    play(course())


def test_a_batch_is_as_long_as_all_its_prompts(table: Table) -> None:
    async def course() -> None:
        steered = steering(table)
        choice = await steered.choose(incoming({"prompt": [ids(100), ids(200, 7)]}, COMPLETIONS), NONE)
        assert life(choice).prompt.tokens == 300
        assert list(life(choice).chain) == chain(table, ids(100))
        answer(steered, choice, cached=250)
        assert steered.ledger.requests == 0, "what was cached of which is not said"

    play(course())


class Broken:
    """A tokeniser with a fault."""

    def tokenise(self, path: str, body: Any) -> list[Tokenised]:
        raise ZeroDivisionError

    async def tokenise_soon(self, path: str, body: Any) -> list[Tokenised]:
        raise ZeroDivisionError


@pytest.mark.parametrize("tokens", [10, 100_000])
def test_a_fault_in_the_tokeniser_costs_credit_and_is_said_once(
    table: Table, caplog: pytest.LogCaptureFixture, tokens: int
) -> None:
    table.manners["w0"] = Manner(Broken(), Scheme(PAGE))  # type: ignore[arg-type]

    async def course() -> None:
        steered = steering(table)
        for _ in range(3):
            answer(steered, await steered.choose(ask(ids(tokens)), NONE))
        assert steered.describe()['prompts_total{tokens="failed"}'] == 3
        assert len(steered.load) == 0

    with caplog.at_level(logging.ERROR):
        play(course())
    assert len(caplog.records) == 1


def test_a_fault_in_the_policy_costs_the_choice_and_not_the_request(
    table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty:
        name = "faulty"

        def choose(self, *_: Any) -> Any:
            raise KeyError("w7")

    async def course() -> None:
        steered = steering(table, Faulty())
        names = set()
        for _ in range(2):
            choice = await steered.choose(ask(ids(100)), NONE)
            names.add(choice.worker.name)
            steered.sent(choice, 100.0)
            steered.first_byte(choice, 200, 100.0)
            steered.progressed(choice, event(), 100.0)
        assert names == {"w0", "w1"}, "the fewest requests"
        steered.finished(choice, "answered", 100.0)
        assert len(steered.load) == 0

    with caplog.at_level(logging.ERROR):
        play(course())
    assert len(caplog.records) == 1
