"""Steering by knowledge: who gets a request, what is learnt from its answer, and that nothing of it is left behind."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import psutil
import pytest

from kvd.router.informed import Informed
from kvd.router.knowledge import Manner
from kvd.router.load import Load, Report
from kvd.router.pages.told import Told
from kvd.router.policies.kvd import Kvd
from kvd.router.policies.named import POLICIES
from kvd.router.proxy.client import Client
from kvd.router.proxy.house import House, Limits
from kvd.router.steering import Busy, Choice, Outcome, Worker
from kvd.router.tenants import Tenants
from kvd.router.tokens.blocks import Scheme, hashes
from kvd.router.tokens.encode import Encoder
from kvd.router.tokens.outcome import Namespace
from kvd.router.tokens.requests import CHAT, COMPLETIONS, GENERATE, Tokenised
from tests import router_models, told_router
from tests.router_harness import MockWorker, post
from tests.router_world import (
    PAGE,
    Table,
    answer,
    ask,
    clock,
    event,
    ids,
    incoming,
    life,
    manner_of,
    play,
    steering,
    whole,
)

NONE: frozenset[str] = frozenset()
SCHEME = Scheme(PAGE)


@pytest.fixture(scope="module")
def manner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manner]:
    made = router_models.with_special(router_models.byte_level())
    opened = manner_of(router_models.folder(tmp_path_factory.mktemp("m"), made))
    asyncio.run(_start_threads(opened.tokeniser.encoder))  # they are no test's own
    yield opened
    opened.tokeniser.close()


async def _start_threads(encoder: Encoder) -> None:
    await asyncio.gather(*(encoder.encode_soon(f"{number} words" * 10_000) for number in range(2)))


@pytest.fixture
def table(manner: Manner) -> Table:
    return Table(["w0", "w1"], manner)


def chain(table: Table, prompt: list[int]) -> list[int]:
    manner = table.manners["w0"]
    assert manner is not None
    return manner.tokeniser.hashes(manner.tokeniser.tokenise(GENERATE, {"input_ids": prompt})[0], manner.scheme)


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


# -- behind the real proxy --------------------------------------------------------------------------------


async def talk(port: int, *requests: bytes) -> bytes:
    """Each over a connection of its own, until the router closes it."""
    said = b""
    for sent in requests:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        said += await reader.read()
        writer.close()
        await writer.wait_closed()
    return said


def test_the_proxy_tells_what_becomes_of_requests(manner: Manner) -> None:
    async def course(*mocks: MockWorker) -> None:
        table = Table([mock.url for mock in mocks], manner)
        workers = [Worker(mock.url, "127.0.0.1", mock.port) for mock in mocks]
        steered = Informed(workers, 256, 16, table, Kvd(table.rates))
        told = Told(told_router.Table(), lambda name: Load(), "kvd", 1, steered.decisions, steered.ledger)
        house = House({worker.name: worker for worker in workers}, steered, Tenants([], b""), Limits(), told)
        server = await house.loop.create_server(lambda: Client(house), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        body = {"text": "many words " * 500, "stream": True, "sampling_params": {"max_new_tokens": 5}}
        said = await talk(port, post(GENERATE, body, "connection: close", "x-kvd-request-id: mine"))
        assert said.count(b"data: {") == 5
        made = steered.decisions.find("mine")
        assert made is not None
        assert (made.outcome, made.tokens) == ("answered", len(manner.tokeniser.text("many words " * 500)))
        assert made.first_at is not None
        assert (table.rate.decode.observed, table.rate.answer_tokens) == (1, 5)

        mocks[[mock.url for mock in mocks].index(made.worker)].kill()
        table.blocks[made.worker].update(manner.tokeniser.hashes(manner.tokeniser.tokenise(GENERATE, body)[0], SCHEME))
        said = await talk(port, post(GENERATE, body | {"stream": False}, "connection: close"))
        assert b'"completion_tokens": 5' in said
        again, first = steered.decisions.last(2)
        assert (first.worker, first.ranked[0].candidate.matched.gpu) == (made.worker, made.tokens // PAGE * PAGE)
        assert (again.tried, again.outcome) == ((made.worker,), "answered")
        assert len(steered.load) == 0
        said = await talk(port, b"GET /kvd/metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b'kvd_router_steering_prompts_total{tokens="tokens"} 3\n' in said
        server.close()
        await house.drain(0.0)

    with MockWorker() as one, MockWorker() as two:
        asyncio.run(course(one, two))


# -- nothing is left --------------------------------------------------------------------------------------

OUTCOMES: tuple[Outcome, ...] = ("answered", "answered", "answered", "unreachable", "no_answer", "cut", "cancelled")


@pytest.mark.parametrize("seed", range(12))
def test_after_all_requests_nothing_is_open(table: Table, seed: int) -> None:
    """Requests of all kinds, their notices in any order that the proxy may send them in."""

    async def course() -> None:
        random, loop = Random(seed), clock()
        steered = steering(table, random.choice(list(POLICIES)), most_each=4, most_waiting=6)
        tasks: list[asyncio.Task[Choice]] = []
        running: list[list[Any]] = []  # choice, and how many notices it has had
        for number in range(400):
            loop.now += random.random() / 10
            step = random.random()
            if step < 0.4:
                body = {
                    "input_ids": ids(random.randint(1, 300), random.randint(1, 5)),
                    "stream": random.random() < 0.7,
                }
                request = incoming(body, request_id=str(random.randint(1, 9)), now=loop.now)
                request.routed = random.random() < 0.9
                tasks.append(asyncio.create_task(steered.choose(request, NONE)))
            elif step < 0.45 and tasks:
                random.choice(tasks).cancel()
            elif step < 0.5:
                steered.tick(loop.now)
                report = Report(loop.now, random.randint(0, 3), random.randint(0, 3), 100, 1000, 100_000)
                steered.load.reported(random.choice(["w0", "w1"]), report)
            elif running:
                notice(random, loop.now, steered, running)
            await asyncio.sleep(0)
            running += [[task.result(), 0] for task in tasks if _chosen(task)]
            tasks = [task for task in tasks if not task.done()]
            if number % 50 == 0:
                table.blocks[random.choice(["w0", "w1"])].update(chain(table, ids(200, random.randint(1, 5))))
        while running or tasks:
            for choice, _ in running:
                steered.finished(choice, "cancelled", loop.now)
            loop.now += 40.0
            steered.tick(loop.now)
            await asyncio.sleep(0)
            running = [[task.result(), 0] for task in tasks if _chosen(task)]
            tasks = [task for task in tasks if not task.done()]
        assert (len(steered.load), len(steered.ledger._open), steered._unheard) == (0, 0, {})
        for worker in ("w0", "w1"):
            load = steered.load.at(worker, loop.now)
            assert (load.requests, load.queued.tokens, load.context_tokens) == (0, 0, 0)
            for first in range(1, 6):
                assert steered.predicted.match(worker, chain(table, ids(300, first)), loop.now) == 0
            assert steered.describe()[f'running{{worker="{worker}"}}'] == 0

    play(course())


def _chosen(task: asyncio.Task[Choice]) -> bool:
    if not task.done() or task.cancelled():
        return False
    error = task.exception()
    assert error is None or isinstance(error, Busy), error
    return error is None


def notice(random: Random, now: float, steered: Any, running: list[list[Any]]) -> None:
    """The next thing that happens to one of them."""
    one = random.choice(running)
    choice, step = one
    one[1] += 1
    if step == 0 and random.random() < 0.9:
        steered.sent(choice, now)
    elif step == 1 and random.random() < 0.9:
        steered.first_byte(choice, random.choice([200, 200, 200, 500]), now)
    elif 1 < step < 5:
        steered.progressed(choice, random.choice([event(64, step), event(), whole(16, 9), b"", b"da"]), now)
    else:
        running.remove(one)
        steered.finished(choice, random.choice(OUTCOMES), now)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes of CPU
def test_a_million_requests_leave_memory_as_it_was(table: Table) -> None:
    async def course() -> list[int]:
        steered, loop, sizes, process = steering(table), clock(), [], psutil.Process()
        bodies = [ask(ids(33, number), stream=number % 3 > 0) for number in range(3000)]
        said = {True: [event(16), event()], False: [whole(16), b""]}
        for number in range(1_000_001):
            loop.now += 0.005
            request = msgspec.structs.replace(bodies[number % 3000], request_id=f"r{number}")
            choice = await steered.choose(request, NONE)
            steered.sent(choice, loop.now)
            steered.first_byte(choice, 200, loop.now)
            for piece in said[number % 3 > 0]:
                steered.progressed(choice, piece, loop.now)
            steered.finished(choice, "answered" if number % 5 else "cancelled", loop.now)
            if number % 16 == 0:
                steered.tick(loop.now)
            if number % 200_000 == 0:
                sizes.append(process.memory_info().rss)
        assert (len(steered.load), len(steered.ledger._open), len(steered._unheard)) == (0, 0, 0)
        return sizes

    sizes = play(course())
    assert sizes[-1] < sizes[1] + (4 << 20), sizes
