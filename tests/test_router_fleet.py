"""Who is there: workers answer, lie, hang, die and come back; operators add, drain and remove them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.errors import Refused
from kvd.router.fleet import watch
from tests import router_models
from tests.fleet_harness import World, describes, free_port
from tests.router_harness import MockWorker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = router_models.with_special(router_models.byte_level())
    return router_models.folder(tmp_path_factory.mktemp("model"), made)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As often as a test wants to know."""
    monkeypatch.setattr(watch, "LOADS_EVERY_S", 0.05)
    monkeypatch.setattr(watch, "HEALTH_EVERY_S", 0.05)
    monkeypatch.setattr(watch, "_BACKOFF_S", (0.05, 0.2))
    return


EVENTS = {"kv_events": {"endpoint_port_base": 1, "block_size": 16, "dp_size": 1}}


def memory(gib: float) -> dict[str, object]:
    return {"internal_states": [{"memory_usage": {"kvcache": gib, "token_capacity": 40_000}}]}


def test_a_worker_with_the_same_tokens_has_a_manner_and_others_say_why_not(model: Path, tmp_path: Path) -> None:
    info = describes(model, **EVENTS)
    with (
        MockWorker(info=info | memory(35.12), model=str(model)) as equal,
        MockWorker(info=info | memory(35.13), model=str(model)) as alike,
        MockWorker(info=info, model=str(model), other_tokens=True) as other,
        MockWorker(info=describes(model), model=str(model)) as silent,
        MockWorker(info=info | {"speculative_algorithm": "EAGLE3"}, model=str(model)) as pairs,
        MockWorker(info=info | {"model_path": str(tmp_path)}, model=str(model)) as elsewhere,
        MockWorker() as stranger,
        World(*(one.url for one in (equal, alike, other, silent, pairs, elsewhere, stranger))) as world,
    ):
        fleet = world.fleet
        world.until(lambda: fleet.manner(equal.url) and fleet.manner(alike.url))
        assert fleet.manner(equal.url) is fleet.manner(alike.url), "one for both"
        assert fleet.manner(equal.url).scheme.page_tokens == 16  # type: ignore[union-attr]
        assert fleet.rates(equal.url) is not fleet.rates(alike.url)
        assert fleet.rates(equal.url).chunk_tokens == 512
        one, two = fleet.rates(equal.url), fleet.rates(alike.url)
        assert one.token_bytes != two.token_bytes, "they had not the same memory left when they started"
        assert one.kind is two.kind is not None, "and are as fast all the same"
        world.until(lambda: world.view(other.url).parity == "differs")
        assert (world.view(other.url).credit, fleet.manner(other.url)) == (False, None)
        assert world.view(other.url).why.startswith("plain text from ")
        assert "tokenizer.json" in world.view(other.url).remedy
        for one, why in (
            (silent, "--kv-events-config"), (pairs, "pairs"), (elsewhere, "not on this machine"), (stranger, "404"),
        ):  # fmt: skip
            world.until(lambda one=one, why=why: why in world.view(one.url).why)
            assert fleet.manner(one.url) is None
        assert world.view(equal.url).why == "no node tells of its blocks"
        assert [world.view(one.url).state for one in (equal, other, stranger)] == ["serving"] * 3
        numbers = fleet.describe()
        assert (numbers[f'parity_differs{{worker="{other.url}"}}'], numbers['workers{state="serving"}']) == (1, 7)


def test_a_tokenizer_at_a_path_that_cannot_be_looked_at_costs_its_worker_the_credit_and_nobody_else(
    model: Path,
) -> None:
    info = describes(model, **EVENTS)
    with (
        MockWorker(info=info | {"tokenizer_path": "/" + "a" * 300}, model=str(model)) as odd,
        MockWorker(info=info, model=str(model)) as other,
        World(odd.url, other.url) as world,
    ):
        world.until(lambda: "cannot be read here: File name too long" in world.view(odd.url).why)
        world.until(lambda: world.fleet.manner(other.url))


def test_workers_that_differ_in_their_adapters_share_a_tokeniser(model: Path) -> None:
    info = describes(model, **EVENTS)
    with (
        MockWorker(info=info | {"lora_paths": ["poet=/p"]}, model=str(model)) as poet,
        MockWorker(info=info, model=str(model)) as plain,
        World(poet.url, plain.url) as world,
    ):
        one, other = world.until(
            lambda: (found := [world.fleet.manner(each.url) for each in (poet, plain)]) and all(found) and found
        )
        assert one.tokeniser is other.tokeniser, "there are eight at most"
        assert (set(one.scheme.adapters), set(other.scheme.adapters)) == ({"poet"}, set())


def test_a_worker_serves_what_it_says_and_everybody_what_nobody_says(model: Path) -> None:
    adapters = {"lora_paths": [{"lora_name": "poet", "lora_path": "/x"}]}
    with (
        MockWorker(info=describes(model, **adapters)) as one,
        MockWorker(info=describes(model, served_model_name="other")) as other,
        World(one.url, other.url) as world,
    ):

        def serves(worker: str, model: str | None) -> bool:
            names = world.fleet.serving(model)
            return names is None or worker in names

        assert serves(one.url, "other"), "nothing is known yet"
        world.until(lambda: not serves(one.url, "other"))
        world.until(lambda: not serves(other.url, "the-model:poet"))
        assert serves(one.url, "the-model")
        assert serves(one.url, str(model))
        assert serves(other.url, str(model))
        for unknown in ("gpt-4", None):
            assert serves(one.url, unknown)
            assert serves(other.url, unknown)


LIES = [
        "nonsense", "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}x",
        "HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n{",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", "HTTP/1.1 200 OK\r\n\r\n" + "[" * 5000,
        'HTTP/1.1 200 OK\r\n\r\n{"model_path": "/x", "kv_events": 5, "lora_paths": 3}',
        'HTTP/1.1 200 OK\r\n\r\n{"model_path": "/x", "kv_events_config": "{", "loads": [{"timestamp": "x"}]}',
        'HTTP/1.1 200 OK\r\n\r\n{"loads": [], "timestamp": "yesterday"}', "HTTP/1.1 999 \r\n\r\n",
        'HTTP/1.1 200 OK\r\n\r\n{"loads": [{"timestamp": -1e308}], "timestamp": "0001-01-01T00:00:00"}',
        "HTTP/1.1 200 OK\r\n" + "x: y\r\n" * 20_000 + "\r\n", "HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n",
]  # fmt: skip


def test_whatever_a_worker_answers_it_is_one_without_credit() -> None:
    with MockWorker() as liar, MockWorker() as other:
        for raw in LIES:
            liar.set(raw=raw)
            with World(liar.url, other.url) as world:
                world.until(lambda world=world: world.view(liar.url).why not in ("", "it was not asked yet"))
                assert world.fleet.manner(liar.url) is None, raw
                assert {world.chosen().worker.name for _ in range(3)} >= {other.url}, raw


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "INFO_S", 0.1)
    monkeypatch.setattr(watch, "LOADS_S", 0.1)
    with MockWorker(deaf=True) as deaf, MockWorker() as other, World(deaf.url, other.url) as world:
        world.until(lambda: "no answer within" in world.view(deaf.url).why)
        world.until(lambda: "no answer within" in world.view(deaf.url).health)
        assert world.view(deaf.url).state == "unhealthy"
        world.settle()
        assert {world.chosen().worker.name for _ in range(4)} == {other.url}


def test_a_worker_that_is_not_well_gets_nothing_while_others_are_there_and_comes_back_by_itself(model: Path) -> None:
    with MockWorker(info=describes(model)) as one, MockWorker() as other, World(one.url, other.url) as world:
        world.until(lambda: world.fleet.state(one.url) == "serving")
        one.set(health=503)
        world.until(lambda: world.fleet.state(one.url) == "unhealthy")
        assert "503" in world.view(one.url).health
        world.settle()
        assert {world.chosen().worker.name for _ in range(4)} == {other.url}
        other.set(health=503)
        world.until(lambda: world.fleet.state(other.url) == "unhealthy")
        world.settle()
        assert {world.chosen().worker.name for _ in range(6)} == {one.url, other.url}, "better than nobody"
        one.set(health=200)
        world.until(lambda: world.fleet.state(one.url) == "serving")
        world.settle()
        assert {world.chosen().worker.name for _ in range(2)} == {one.url}


def test_a_worker_that_died_is_asked_anew_when_it_is_back(model: Path) -> None:
    port = free_port()
    info = describes(model, **EVENTS)
    url = f"http://127.0.0.1:{port}"
    with World(url) as world:
        world.until(lambda: world.fleet.state(url) == "unhealthy")
        with MockWorker(port, info=info, model=str(model)):
            manner = world.until(lambda: world.fleet.manner(url))
            assert world.fleet.state(url) == "serving"
        world.until(lambda: world.fleet.state(url) == "unhealthy")
        wider = info | {"kv_events": {"endpoint_port_base": 1, "block_size": 64}, "page_size": 64}
        with MockWorker(port, info=wider, model=str(model)):
            world.until(lambda: world.fleet.manner(url) not in (None, manner))
            assert world.fleet.manner(url).scheme.page_tokens == 64  # type: ignore[union-attr]


def test_what_an_engine_says_of_its_load_is_told_as_of_when_it_wrote_it_down() -> None:
    load = {
        "dp_rank": 0, "timestamp": 1000.0, "num_running_reqs": 3, "num_waiting_reqs": 0, "num_used_tokens": 700,
        "num_waiting_uncached_tokens": 90, "max_total_num_tokens": 1000,
    }  # fmt: skip
    other = {**load, "dp_rank": 1, "timestamp": 998.5, "num_waiting_reqs": 2}
    loads = {"timestamp": "1970-01-01T00:16:41+00:00", "loads": [load, other]}
    with MockWorker(loads=loads) as one, World(one.url) as world:
        report = world.until(lambda: world.reports.get(one.url))
        assert report[1:] == (6, 2, 180, 1400, 2000)
        age = world._loop.time() - report.made_at
        assert 2.5 <= age < 10, "1001 - 998.5"
        loads["loads"] = [{**load, "num_waiting_reqs": 0}]
        one.set(loads=loads)
        world.until(lambda: world.reports[one.url].running == 3)
        assert world.reports[one.url].waiting == 1, "the prompt whose chunks are computed"


def test_workers_are_added_drained_and_removed_while_they_answer(model: Path) -> None:
    with MockWorker(info=describes(model)) as first, MockWorker(info=describes(model)) as second, World() as world:
        fleet, steering = world.fleet, world.steering
        world.until(lambda: not fleet.members())
        assert world.order(fleet.add, f"{first.url}/") == first.url
        world.until(lambda: fleet.state(first.url) == "serving")
        world.settle()
        busy = [world.chosen() for _ in range(2)]
        world.order(fleet.add, second.url)
        assert world.doors.open == {first.url, second.url}
        assert world.chosen().worker.name == first.url, "the other has not said yet that it is there"
        world.until(lambda: fleet.state(second.url) == "serving")
        world.settle()
        assert world.chosen().worker.name == second.url
        world.order(fleet.drain, first.url)
        assert fleet.state(first.url) == "draining"
        assert {world.chosen().worker.name for _ in range(5)} == {second.url}
        world.order(fleet.add, first.url)
        assert world.chosen().worker.name == first.url, "it was taken back"
        world.order(fleet.drain, first.url)
        for _ in range(steering.running(first.url) - 1):
            steering.finished(busy[0], "answered", 0.0)
        assert first.url in world.doors.open
        steering.finished(busy[1], "answered", 0.0)
        world.until(lambda: fleet.state(first.url) == "gone")
        assert world.doors.open == {second.url}
        world.order(fleet.remove, second.url)
        assert (fleet.members(), world.doors.open, fleet.state(second.url)) == ([], set(), "gone")
        steering.finished(busy[1], "answered", 0.0)  # too late: it has left
        for order in (fleet.drain, fleet.remove):
            with pytest.raises(Refused, match="no worker"):
                world.order(order, first.url)
        with pytest.raises(Refused, match="http://HOST:PORT"):
            world.order(fleet.add, "https://nowhere")


def test_a_hundred_workers_are_watched_at_once(model: Path) -> None:
    """One process at a hundred addresses: 127.0.0.1 to 127.0.0.100."""
    with MockWorker(info=describes(model, **EVENTS), model=str(model), host="0.0.0.0") as mock:
        urls = [f"http://127.0.0.{n}:{mock.port}" for n in range(1, 101)]
        with World(*urls) as world:
            world.until(lambda: all(world.fleet.manner(url) for url in urls), 30)
            assert len({world.fleet.manner(url) for url in urls}) == 1
            assert "another worker states the same" in world.view(urls[0]).why
            assert {view.state for view in world.fleet.members()} == {"serving"}
