"""Workers come and go while the proxy answers: nobody's answer suffers, and the proxy knows who is there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.router.fleet import watch
from tests.fleet_harness import Proxied, Publishing, node
from tests.harness import eventually
from tests.router_harness import MockWorker, Router, post
from tests.test_router_fleet_nodes import model  # noqa: F401


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as a test wants to know."""
    monkeypatch.setattr(watch, "LOADS_EVERY_S", 0.05)
    monkeypatch.setattr(watch, "HEALTH_EVERY_S", 0.05)


@pytest.fixture
def two() -> Iterator[tuple[MockWorker, MockWorker]]:
    with MockWorker(hold=True) as one, MockWorker(hold=True) as other:
        yield one, other


PROMPT = {"prompt": "a b c", "max_tokens": 6, "stream": True}


def words(answer: str) -> list[str]:
    return re.findall(r'"text": ?"( w\d+)"', answer)


def test_a_drained_worker_finishes_its_streams_and_then_goes(two: tuple[MockWorker, MockWorker]) -> None:
    one, other = two
    with Proxied(one.url, other.url) as world:
        stream = world.start(world.ask("POST", "/v1/completions", PROMPT))
        world.until(lambda: one.requests or other.requests)
        busy, idle = (one, other) if one.requests else (other, one)
        world.order(world.fleet.drain, busy.url)
        idle.set(hold=False)
        for _ in range(3):
            assert len(words(world.run(world.ask("POST", "/v1/completions", PROMPT)))) == 6
        assert (len(busy.requests), len(idle.requests)) == (1, 3)
        for _ in range(5):
            busy.step()
        world.settle()
        assert world.fleet.state(busy.url) == "draining"
        busy.step()
        world.until(stream.done)
        assert words(stream.result()) == [f" w{n}" for n in range(4, 10)]
        world.until(lambda: world.fleet.state(busy.url) == "gone")
        assert list(world.house.pools) == [idle.url]
        answer = world.run(world.ask("GET", "/get_model_info", None, f"x-kvd-worker: {busy.url}"))
        assert answer.startswith("HTTP/1.1 404")
        assert idle.url in answer


def test_streams_of_a_removed_worker_go_on_elsewhere(two: tuple[MockWorker, MockWorker]) -> None:
    one, other = two
    with Proxied(one.url, other.url) as world:
        stream = world.start(world.ask("POST", "/v1/completions", PROMPT))
        world.until(lambda: one.requests or other.requests)
        busy, idle = (one, other) if one.requests else (other, one)
        busy.step()
        busy.step()
        world.until(lambda: world.house.steering.describe()[f'running{{worker="{busy.url}"}}'] == 1)
        world.order(world.fleet.remove, busy.url)
        idle.set(hold=False)
        world.until(stream.done)
        assert words(stream.result()) == [f" w{n}" for n in range(4, 10)]
        assert "[DONE]" in stream.result()
        world.until(lambda: busy.seen["cancelled"] == 1)
        assert [request["target"] for request in idle.requests] == ["/tokenize", "/v1/completions"]


def test_an_order_for_every_worker_reaches_those_who_are_there(two: tuple[MockWorker, MockWorker]) -> None:
    one, other = two
    with MockWorker() as third, Proxied(one.url, other.url) as world:
        world.order(world.fleet.add, third.url)
        world.order(world.fleet.remove, one.url)
        answer = world.run(world.ask("POST", "/flush_cache", {}))
        assert set(json.loads(answer.partition("\r\n\r\n")[2])) == {other.url, third.url}


def test_nobody_is_there() -> None:
    with Proxied() as world:
        answer = world.run(world.ask("POST", "/v1/completions", PROMPT))
        assert answer.startswith("HTTP/1.1 503")
        assert "there is no worker" in answer


def test_a_router_without_workers_of_its_own_takes_them_from_its_nodes(model: Path, tmp_path: Path) -> None:  # noqa: F811
    with (
        Publishing(model) as worker, node(worker.url) as (_, at),
        Router(tmp_path, nodes=json.dumps([{"events": at.events}]), model_path=model) as router,
    ):  # fmt: skip
        worker.events.do("store", 11)

        def credited() -> bool:
            return router.metrics().get(f'fleet_credit{{worker="{worker.url}"}}') == 1

        eventually(credited, 20, "the worker has joined, its tokens are ours, its blocks are known")
        assert router.metrics()["fleet_index_blocks"] == 1
        answer = router.talk(post("/v1/completions", PROMPT, "connection: close"))
        assert words(answer.decode()) == [f" w{n}" for n in range(4, 10)]
