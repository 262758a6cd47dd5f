"""Workers that answer errors are in doubt, not favoured, and what is a client's fault is no worker's."""

import msgspec
import pytest

from kvd.router.informed import Informed
from kvd.router.steering import Choice, Worker
from tests.router_world import (
    NONE,
    Table,
    ask,
    clock,
    ids,
    play,
    steering,
)


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
