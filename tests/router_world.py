"""Steering without a fleet: what workers have and serve as a table, time as a number, answers as SGLang sends them."""

import asyncio
import json
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from kvd.router.informed import Informed, Life
from kvd.router.knowledge import Manner
from kvd.router.policies.choice import Matched, Policy
from kvd.router.policies.named import POLICIES
from kvd.router.rates import Rates
from kvd.router.steering import Choice, Incoming, Outcome, Worker
from kvd.router.tokens.blocks import Scheme
from kvd.router.tokens.encode import Encoder
from kvd.router.tokens.requests import GENERATE, Tokeniser
from kvd.router.tokens.serving import Serving
from tests import router_models

PAGE = 16
NONE: frozenset[str] = frozenset()  # of the workers that were asked before
T = TypeVar("T")


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is set by hand. Nothing here sets timers."""

    now = 100.0

    def time(self) -> float:
        return self.now


class Table:
    """Implements kvd.router.knowledge.Knowledge: what each worker has, as sets of blocks."""

    def __init__(self, workers: Sequence[str], manner: Manner | None) -> None:
        self.manners: dict[str, Manner | None] = dict.fromkeys(workers, manner)
        self.models: dict[str, str] = {}
        self.blocks: dict[str, set[int]] = {worker: set() for worker in workers}
        self.rate = Rates()

    def serving(self, model: str | None) -> set[str] | None:
        return None if model is None else {name for name in self.manners if self.models.get(name, model) == model}

    def manner(self, worker: str) -> Manner | None:
        return self.manners.get(worker)

    def matched(
        self, chains: Mapping[Manner, Sequence[int]], tokens: int, stored: Mapping[Manner, Sequence[int]]
    ) -> dict[str, Matched]:
        found = {}
        for worker, blocks in self.blocks.items():
            manner = self.manners[worker]
            if manner is not None and (has := sum(1 for _ in takewhile(blocks.__contains__, chains.get(manner, ())))):
                found[worker] = Matched(gpu=min(has * manner.scheme.page_tokens, tokens))
        return found

    def rates(self, worker: str) -> Rates:
        return self.rate


@contextmanager
def open_manner(folder: Path) -> Iterator[Manner]:
    """A tokenizer of bytes, in blocks of PAGE tokens."""
    model = router_models.folder(folder, router_models.with_special(router_models.byte_level()))
    found = Manner(Tokeniser.open(model, Serving()), Scheme(PAGE))
    asyncio.run(_start_threads(found.tokeniser.encoder))  # they are no test's own
    yield found
    found.tokeniser.close()


async def _start_threads(encoder: Encoder) -> None:
    await asyncio.gather(*(encoder.encode_soon(f"{number} words" * 10_000) for number in range(2)))


def chain(table: Table, prompt: list[int]) -> list[int]:
    manner = table.manners["w0"]
    assert manner is not None
    return manner.tokeniser.hashes(manner.tokeniser.tokenise(GENERATE, {"input_ids": prompt})[0], manner.scheme)


def steering(
    table: Table, policy: str | Policy = "kvd", most_each: int = 256, most_waiting: int = 1024, seed: float = 0.5
) -> Informed:
    workers = [Worker(name, "127.0.0.1", 30000 + number) for number, name in enumerate(table.manners)]
    made = POLICIES[policy](lambda: seed, table.rates) if isinstance(policy, str) else policy
    return Informed(workers, most_each, most_waiting, table, made)


def incoming(body: Any, path: str = GENERATE, request_id: str = "r", now: float = Clock.now) -> Incoming:
    data = json.dumps(body).encode()
    return Incoming(request_id, "POST", path, [], data, "", 1.0, 0, now, now + 30.0, True)


def ids(tokens: int, first: int = 1, last: int = 0) -> list[int]:
    """A prompt: those with the same `first` are equal up to their last token."""
    return [*range(1000 * first, 1000 * first + tokens - 1), last]


def ask(
    prompt: list[int], stream: bool = True, request_id: str = "r", now: float = Clock.now, **more: Any
) -> Incoming:
    return incoming({"input_ids": prompt, "stream": stream, **more}, request_id=request_id, now=now)


def play(course: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(course)


def clock() -> Clock:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Clock)
    return loop


def event(cached: int | None = None, written: int = 1) -> bytes:
    """One of /generate's."""
    meta = {"id": "x", "prompt_tokens": 9, "completion_tokens": written}
    meta |= {"cached_tokens": cached} if cached is not None else {}
    return b"data: %b\n\n" % json.dumps({"text": "a", "meta_info": meta}).encode()


def whole(cached: int | None = None, written: int = 1) -> bytes:
    return event(cached, written).removeprefix(b"data: ").strip()


def life(choice: Choice) -> Life:
    assert isinstance(choice.note, Life)
    return choice.note


def answer(
    steered: Informed, choice: Choice, tokens: int = 3, cached: int | None = None, each_s: float = 0.1,
    outcome: Outcome = "answered",
) -> None:  # fmt: skip
    """The whole of it: sent, a first token after `each_s`, and so on."""
    loop = clock()
    steered.sent(choice, loop.now)
    stream = life(choice).prompt.stream
    for number in range(tokens):
        loop.now += each_s
        if number == 0 and stream:
            steered.first_byte(choice, 200, loop.now)
        if stream:
            steered.progressed(choice, event(cached, number + 1), loop.now)
    if not stream:
        steered.first_byte(choice, 200, loop.now)
        steered.progressed(choice, whole(cached, tokens), loop.now)
    steered.finished(choice, outcome, loop.now)
