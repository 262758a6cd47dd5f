"""Steering by knowledge: who gets a request, and that none is lost to what is not known."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from kvd.router.knowledge import Manner
from kvd.router.policies.named import POLICIES
from kvd.router.steering import Busy
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
