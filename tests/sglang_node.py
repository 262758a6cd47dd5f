"""What the tests with a real SGLang share: the worker, the prompts, and what a worker without kvd answers to them.

Prompts are token ids, drawn once: equal everywhere, and wrong KV under them gives other tokens. A request with a
`cache_salt` of its own is cold wherever it goes and has the same answer.
"""

import functools
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvd.pages import chain
from tests.harness import Daemon, eventually
from tools.demo.node import LOGS, MODEL, ROOT, VENV, extra_config
from tools.sglang_cpu.endpoint import Endpoint, Generation
from tools.sglang_cpu.server import HiCache, SglangServer
from tools.sglang_cpu.setup_env import environment_of

VARIANT = ROOT / ".models/variant-1" / MODEL.name
SERVED_AS = "the-model"
NEW_TOKENS = 4  # a step of one token costs as much as a short prompt
PAGE_TOKENS = 64
ARENA_MIB = 768  # the whole tree is 7,000 tokens of 46,080 bytes
WORDS = range(1_000, 40_000)  # token ids of plain text; the first few are control tokens

Prompt = tuple[int, ...]
Answers = Mapping[Prompt, list[int]]

_needed = (VENV / "bin/python", MODEL / "model.safetensors")
_missing = [str(path.relative_to(ROOT)) for path in _needed if not path.exists()]
needs_sglang = pytest.mark.skipif(bool(_missing), reason=f"no {' and no '.join(_missing)}: run `make sglang`")


def told_by_sglang(program: str) -> str:
    """What a Python program prints that runs where SGLang is installed."""
    told = subprocess.run(
        [str(VENV / "bin/python"), "-W", "ignore", "-c", program],
        env=environment_of(VENV),
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    return told.stdout


def words(seed: int, count: int) -> Prompt:
    return tuple(Random(seed).choices(WORDS, k=count))


def _tree() -> list[Prompt]:
    """52 prompts of 100 to 700 tokens: one system prompt, five topics, questions, continuations, two strangers."""
    draw = Random(20)
    prompts = [words(1, 100), words(2, 700)]
    system = words(3, 200)  # ends within a page, whatever the page size
    for topic in range(5):
        shared = system + words(10 + topic, draw.randint(40, 140))
        questions = [shared + words(100 * topic + 100 + n, draw.randint(10, 190)) for n in range(9)]
        follow_up = questions[0] + words(1000 + topic, draw.randint(60, 100))
        prompts += [*questions, follow_up]
    return prompts


TREE = _tree()


def pages_of(prompts: Sequence[Sequence[int]], page_tokens: int) -> int:
    """How many different whole pages these token sequences have."""
    return len({key for tokens in prompts for key in chain(tokens, page_tokens)})


def reusable(prompt: Sequence[int], page_tokens: int) -> int:
    """Tokens of a prompt that a cache can give: whole pages, and one token is always computed."""
    return (len(prompt) - 1) // page_tokens * page_tokens


def salt() -> str:
    return secrets.token_hex(8)


def worker(
    name: str,
    socket: Path | None,
    *,
    layout: str = "page_first_direct",
    io_backend: str = "direct",
    v1: bool = True,
    model: Path = MODEL,
    page_size: int = PAGE_TOKENS,
    args: Sequence[str] = (),
    hicache: HiCache | None = None,
    **options: Any,
) -> SglangServer:
    """A server with kvd behind its HiCache, not started; without a socket, one that has `hicache`, or none."""
    cache = hicache
    if socket is not None:
        extra = extra_config(socket)
        if not v1:
            del extra["interface_v1"]
        cache = HiCache(layout, io_backend, storage_backend="dynamic", extra_config=extra)
    return SglangServer(
        VENV, model, LOGS / f"test-{name}.log", hicache=cache, page_size=page_size,
        args=["--served-model-name", SERVED_AS, *args], **options,
    )  # fmt: skip


def ask(server: Endpoint, prompt: Prompt, **fields: Any) -> Generation:
    return server.generate(input_ids=prompt, max_new_tokens=NEW_TOKENS, **fields)


def plugin_ready(kvd: Daemon, ranks: int = 1, timeout_s: float = 20) -> None:
    """Until that many ranks are attached, have named their pools, and have reported that their circuits are closed."""

    def ready() -> bool:
        reports = [worker for worker in kvd.status().workers if worker.pools and worker.counters]
        return [worker.circuit for worker in reports] == ["closed"] * ranks

    eventually(ready, timeout_s, f"{ranks} ranks are attached")


def pages_held(kvd: Daemon) -> int:
    return kvd.status().tiers[0].pages


def fill(server: SglangServer, prompts: Sequence[Prompt], **fields: Any) -> list[tuple[Prompt, Generation]]:
    """Ask one by one, then empty the worker's own caches; SGLang does not until all is written to storage."""
    answers = [(prompt, ask(server, prompt, **fields)) for prompt in prompts]
    server.flush_cache()
    return answers


@dataclass
class Crowd:
    """Clients that ask at once, each its prompts in turn. `join` gives all answers and raises what a client met."""

    server: SglangServer
    salt: str | None = None
    answers: list[tuple[Prompt, Generation]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def ask(self, *lists: Sequence[Prompt]) -> "Crowd":
        fresh = [threading.Thread(target=self._client, args=(prompts,)) for prompts in lists]
        self._threads += fresh
        for thread in fresh:
            thread.start()
        return self

    def _client(self, prompts: Sequence[Prompt]) -> None:
        fields = {} if self.salt is None else {"cache_salt": self.salt}
        try:
            for prompt in prompts:
                self.answers.append((prompt, ask(self.server, prompt, **fields)))
        except Exception as error:
            self.failures.append(error)

    def wait(self, timeout_s: float = 120) -> None:
        """Until every client has ended, with all its answers or with a failure."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        alive = any(thread.is_alive() for thread in self._threads)
        assert not alive, f"a request had no answer after {timeout_s} s: {self.server.log_tail()}"

    def join(self, timeout_s: float = 120) -> list[tuple[Prompt, Generation]]:
        self.wait(timeout_s)
        if self.failures:
            raise self.failures[0]
        return self.answers


@functools.cache
def reference_answers() -> Answers:
    """The answers of a worker that has neither kvd nor a HiCache; asked for once in a run of the tests."""
    with worker("plain", None) as server:
        answers = Crowd(server).ask(*(TREE[client::8] for client in range(8))).join(300)
    return {prompt: answer.output_ids for prompt, answer in answers}


def wrong(answers: Sequence[tuple[Prompt, Generation]], reference: Answers) -> list[tuple[int, list[int], list[int]]]:
    """Prompt length, answer and right answer of each that differs."""
    return [
        (len(prompt), answer.output_ids, reference[prompt])
        for prompt, answer in answers
        if answer.output_ids != reference[prompt]
    ]


@contextmanager
def closing_server(server: SglangServer) -> Iterator[SglangServer]:
    """For a server that is started by hand."""
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def running(
    name: str, ranks: int = 1, meanwhile: Callable[[], object] = lambda: None, **options: Any
) -> Iterator[tuple[Daemon, SglangServer]]:
    """A kvd and a worker attached to it, ready. While they start, do `meanwhile`."""
    with (
        tempfile.TemporaryDirectory(prefix="kvd-test-") as folder,  # short, for a socket's path
        daemon_in(Path(folder)) as kvd,
        closing_server(worker(name, kvd.socket, **options)) as server,
    ):
        server.start()
        meanwhile()
        server.wait_ready()
        plugin_ready(kvd, ranks)
        yield kvd, server


def other_revision() -> Path:
    """A folder with another revision of the model, made once."""
    if not (VARIANT / "model.safetensors").exists():
        maker = [str(VENV / "bin/python"), str(ROOT / "tools/sglang_cpu/make_model.py"), str(VARIANT)]
        made = subprocess.run([*maker, "--seed-variant", "1"], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"cannot make another revision of the model: {made.stderr[-300:]}")
    return VARIANT


def daemon_in(folder: Path) -> Daemon:
    return Daemon(folder, arena_mib=ARENA_MIB, extent_mib=16)
