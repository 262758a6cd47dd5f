"""Steering by knowledge leaves nothing behind: behind the real proxy, after any course, after a million requests."""

import asyncio
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
from kvd.router.tokens.blocks import Scheme
from kvd.router.tokens.requests import GENERATE
from tests import told_router
from tests.router_harness import MockWorker, post
from tests.router_world import (
    NONE,
    PAGE,
    Table,
    ask,
    chain,
    clock,
    event,
    ids,
    incoming,
    play,
    steering,
    whole,
)

SCHEME = Scheme(PAGE)


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
