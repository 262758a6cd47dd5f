"""kvd-router before two and before four real SGLang workers: answers, prefixes, cancelling, deaths, restarts."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.harness import eventually
from tests.kvdctl import kvdctl
from tests.router_harness import Router
from tests.sglang_fleet import World, url_of, world
from tests.sglang_node import NEW_TOKENS, PAGE_TOKENS, SERVED_AS, ask, needs_sglang, pages_held, words

pytestmark = [needs_sglang, pytest.mark.slow, pytest.mark.timeout(1200)]

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip
STORY = "Once upon a time there was a small house at the edge of the wood. "
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Say hello."}]},
    {"messages": [{"role": "system", "content": STORY * 8}, {"role": "user", "content": "Who lives there?"}]},
    {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "tools": [TOOL]},
    {
        "messages": [
            {"role": "user", "content": STORY},
            {"role": "assistant", "content": "A nice house."},
            {"role": "user", "content": "Go on."},
        ]
    },
]


@contextmanager
def routed(count: int, attached: bool = True) -> Iterator[World]:
    with world(count, attached) as made:
        made.router = made.start_router()
        try:
            yield made
        finally:
            made.router.stop()


@pytest.fixture(scope="module", params=[2, 4])
def fleet(request: pytest.FixtureRequest) -> Iterator[World]:
    with routed(request.param) as made:
        yield made


def at(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)


def answers(client: openai.OpenAI) -> list[Any]:
    """Everything, streamed and whole, that this test compares."""
    found: list[Any] = []
    for chat in CHATS:
        common = {"model": SERVED_AS, "temperature": 0, "max_tokens": 12, **chat}
        whole = client.chat.completions.create(**common)
        usage = whole.usage
        found.append((whole.choices[0].message.content, whole.choices[0].message.tool_calls, usage.prompt_tokens))
        stream = client.chat.completions.create(stream=True, **common)
        found.append("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
    plain = {"model": SERVED_AS, "temperature": 0, "max_tokens": 12, "prompt": STORY}
    found.append(client.completions.create(**plain).choices[0].text)
    found.append("".join(part.choices[0].text for part in client.completions.create(stream=True, **plain)))
    return found


def test_a_stream_goes_on_when_its_worker_is_killed() -> None:
    """Before `fleet`: SGLang wants ten GB free for a start, so these workers do not go with those of the others."""
    asked = {"model": SERVED_AS, "prompt": STORY, "max_tokens": 60, "temperature": 0, "stream": True}
    with routed(2) as fleet, at(fleet.servers[0].port) as direct, at(fleet.router.port) as client:
        right = "".join(part.choices[0].text for part in direct.completions.create(**asked))
        said, victim = "", ""
        for number, part in enumerate(client.completions.create(**asked)):
            said += part.choices[0].text if part.choices else ""
            if number == 5:
                victim = fleet.router.page("decisions", last=1)["decisions"][0]["worker"]
                fleet.server_at(victim).kill()
        assert said == right
        assert fleet.router.metrics()["continued_total"] == 1
        again = fleet.server_at(victim)
        again.start()
        again.wait_ready()
        fleet.credited(fleet.router)


@pytest.mark.parametrize("count", [2, 4])
def test_a_prompt_goes_where_its_prefix_is_and_the_router_can_say_so(count: int) -> None:
    """Without kvd behind the workers, so that only one of them has it: by chance it would be met once in `count`."""
    with routed(count, attached=False) as fleet:
        for number in range(10):  # it knows no worker's speed before it has seen some prompts
            ask(fleet.door, words(400 + number, 300))
        for topic in range(6):
            shared = words(500 + topic, 4 * PAGE_TOKENS)
            before = blocks_known(fleet)
            cold = ask(fleet.door, shared + words(600 + topic, 40))
            assert cold.cached.total == 0
            home = decided(fleet, last=1)["worker"]
            eventually(lambda before=before: blocks_known(fleet) >= before + 4, 20, "the worker's events have come")
            eventually(lambda: not any(each["running"] for each in workers(fleet)), 20, "so have their loads")
            warm = ask(fleet.door, shared + words(700 + topic, 50))
            made = decided(fleet, last=1)
            assert made["worker"] == home, made["why"]
            assert made["ranked"][0]["matched"]["gpu"] == warm.cached.device == 4 * PAGE_TOKENS
            assert made["cached_tokens"] == warm.cached.total
            assert made["actual_ttft_s"] > 0
            explained = kvdctl("explain", made["request"], "--router", fleet.router.url).stdout
            assert home in explained
            assert made["why"] in explained
        assert fleet.router.page("ledger")["achieved"] >= 6 * 4 * PAGE_TOKENS


@pytest.mark.parametrize("salt", [{}, {"cache_salt": "tenant-1"}], ids=["plain", "salted"])
def test_what_is_in_kvds_memory_alone_is_known_to_be_there(fleet: World, salt: dict[str, str]) -> None:
    prompt = words(800 + len(salt), 5 * PAGE_TOKENS + 8)
    fleet.flush()
    held = pages_held(fleet.kvd)
    eventually(lambda: holders(fleet) <= 1, 20, "the router has heard that the workers have nothing")
    assert ask(fleet.door, prompt, **salt).cached.total == 0
    eventually(lambda: pages_held(fleet.kvd) >= held + 5, 20, "kvd has its pages")
    eventually(lambda: holders(fleet) == 3, 20, "the router has heard of them, and of the worker's on GPU and host")

    def warm() -> tuple[int, int, int] | None:
        fleet.flush()
        eventually(lambda: holders(fleet) == 1, 20, "the router has heard that nobody else has anything")
        answer = ask(fleet.door, prompt, **salt)
        matched = decided(fleet, last=1)["ranked"][0]["matched"]
        return (matched["gpu"], matched["ram"], answer.cached.storage) if matched["ram"] else None

    # Which workers can load from a namespace the router hears some moments after the namespace's first page.
    assert eventually(warm, 20, "it knows who can load them") == (0, 5 * PAGE_TOKENS, 5 * PAGE_TOKENS)


def test_official_clients_get_what_a_direct_call_gives(fleet: World) -> None:
    with at(fleet.servers[0].port) as direct, at(fleet.router.port) as routed:
        assert answers(routed) == answers(direct)
        assert [model.id for model in routed.models.list()] == [model.id for model in direct.models.list()]
    body = {"model": SERVED_AS, "messages": CHATS[0]["messages"], "max_tokens": 8, "temperature": 0}
    told = [json.loads(server.request("POST", "/v1/messages", body)) for server in (fleet.servers[0], fleet.door)]
    assert told[0]["content"] == told[1]["content"]


def decided(fleet: World, **asked: object) -> dict[str, Any]:
    """The decision; told of its end, which comes a moment after the answer."""

    def ended() -> Any:
        made = fleet.router.page("decisions", **asked)["decisions"][0]
        return made if made["outcome"] else None

    found: dict[str, Any] = eventually(ended, 10, "the decision's end is told")
    return found


def workers(fleet: World) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = fleet.router.page("workers")["workers"]
    return found


def holders(fleet: World) -> float:
    """How many have blocks: workers' memories, and kvd's tiers."""
    return fleet.router.metrics()["fleet_index_holders"]


def blocks_known(fleet: World) -> float:
    """How many the router has in its index."""
    return fleet.router.metrics()["fleet_index_blocks"]


def test_two_hundred_streams_at_once(fleet: World) -> None:
    prompts = [f"{STORY * (1 + n % 4)} Chapter {n}:" for n in range(20)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=SERVED_AS, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=True
        )
        return "".join([part.choices[0].text async for part in stream])

    async def crowd(port: int, times: int) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600
        ) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts * times))

    right = asyncio.run(crowd(fleet.servers[0].port, 1))
    assert asyncio.run(crowd(fleet.router.port, 10)) == right * 10
    served = {made["worker"] for made in fleet.router.page("decisions", last=100)["decisions"]}
    assert served == set(map(url_of, fleet.servers)), "nobody is spared"
    eventually(lambda: running(fleet) == 0, 30, "nothing is left anywhere")


def running(fleet: World) -> int:
    """Requests that engines have."""
    count = 0
    for server in fleet.servers:
        told = json.loads(server.request("GET", "/v1/loads"))
        count += sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in told["loads"])
    return count


def test_a_client_that_leaves_ends_its_request_at_the_worker(fleet: World) -> None:
    with at(fleet.router.port) as client:
        stream = client.completions.create(
            model=SERVED_AS, prompt=STORY, max_tokens=3000, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        eventually(lambda: running(fleet) == 1, 10, "it runs")
        stream.close()
    eventually(lambda: running(fleet) == 0, 10, "nobody generates for nobody")


def test_a_router_is_replaced_under_load(fleet: World) -> None:
    old = fleet.start_router()
    fresh: Router | None = None
    stop, failures, done = threading.Event(), list[Exception](), list[str]()

    def client(number: int) -> None:
        with at(old.port) as mine:
            while not stop.is_set():
                try:
                    text = mine.completions.create(model=SERVED_AS, prompt=f"{number}: {STORY}", max_tokens=3)
                    done.append(text.choices[0].text)
                except openai.APIError as error:
                    failures.append(error)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for each in clients:
        each.start()
    try:
        eventually(lambda: len(done) > 8, 60, "requests are answered")
        fresh = fleet.start_router(port=old.port, take_over=True)
        before = len(done)
        old.stop()
        eventually(lambda: len(done) > before + 8, 60, "requests are answered by the other router")
    finally:
        stop.set()
        for each in clients:
            each.join()
        for router in (old, fresh):
            if router is not None:
                router.stop()
    assert not failures
