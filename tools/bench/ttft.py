"""How long until the first token: cold, from the worker's own device cache, and from kvd? And does kvd slow a worker?

One real SGLang server with a small real model (SmolLM2-135M, float32, pages of 64 tokens) and a HiCache. kvd is
attached to it and detached again while it runs, once a round and in turn, because two servers of the same kind differ
by more (6 % were seen) than what is looked for. Every round has a prompt of fresh random tokens, so cold is cold. With
kvd attached it is asked again, from its own device cache and, after /flush_cache, from kvd alone. A round goes on when
the pages are written: writing is not in anybody's time.

Ratios, all at 1.5k tokens: `kvd_vs_device`, a hit in kvd next to a hit in the device cache; `cold_vs_kvd_1500`, how
many times sooner the token comes than cold; `attached_vs_plain`, a cold prompt with kvd attached next to one without.

On a CPU, SGLang's torch_native attention computes over cached tokens too (a GPU's does not), so all caches gain less
here than they would there: `kvd_vs_device` is what to look at. Starting the server is set-up, about half a minute.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from tests.harness import Daemon, eventually
from tools.bench._kvd import running_daemon, scratch
from tools.bench._table import Options, Samples, Table, finish, interleave, options, progress, spread
from tools.demo.node import LOGS, MODEL, PAGE_TOKENS, VENV, extra_config
from tools.sglang_cpu.endpoint import Generation
from tools.sglang_cpu.server import HiCache, SglangServer

LENGTHS = {500: (2, 12), 1500: (3, 24), 3000: (0, 3)}  # prompt tokens: rounds with --quick, and without
KEY = 1500  # the length that the ratios are of
ARENA_MIB = 1024
WORDS = range(1_000, 40_000)
PLAIN, COLD, DEVICE, KVD = "cold, without kvd", "cold, kvd attached", "device cache", "kvd"


def main() -> None:
    wanted = options(__doc__)
    if not (VENV / "bin/python").exists() or not (MODEL / "model.safetensors").exists():
        sys.exit("there is no SGLang here: run `make sglang`")
    table = Table(
        "Time to first token, median (min..max)", ("prompt", "prefix from", "seconds", "cold/this", "this/device")
    )
    results: dict[int, Samples] = {}
    with _daemon() as daemon, _server() as server:
        asked = Asked(server, daemon)
        for length in LENGTHS:
            if rounds := wanted.rounds(*LENGTHS[length]):
                progress(f"{length} tokens, {rounds} rounds")
                results[length] = interleave([partial(asked.round, length)], rounds)
    for length, samples in results.items():
        _add_rows(table, length, samples)
    _report(table, results, wanted)


@contextmanager
def _daemon() -> Iterator[Daemon]:
    with scratch() as folder, running_daemon(folder / "run", ARENA_MIB) as daemon:
        yield daemon


@contextmanager
def _server() -> Iterator[SglangServer]:
    """With a HiCache and no storage; ready."""
    server = SglangServer(VENV, MODEL, LOGS / "bench-ttft.log", page_size=PAGE_TOKENS, hicache=HiCache())
    progress("starting a server")
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.stop()


class Asked:
    """The server, with kvd and without, and what it is asked."""

    def __init__(self, server: SglangServer, daemon: Daemon) -> None:
        self._server = server
        self._daemon = daemon
        self._attached = False

    def round(self, length: int, number: int) -> Mapping[str, float]:
        """Every figure once for a fresh prompt; the half that the last round ended with comes first."""
        prompt = random.choices(WORDS, k=length)
        halves = (self._without, self._with)
        figures: dict[str, float] = {}
        for half in halves[:: -1 if number % 2 else 1]:
            figures |= half(prompt)
            self._server.flush_cache()
        return figures

    def _without(self, prompt: Sequence[int]) -> Mapping[str, float]:
        if self._attached:
            self._server.detach_storage()
            self._attached = False
            self._settle()
        return {PLAIN: self._ask(prompt, "")}

    def _with(self, prompt: Sequence[int]) -> Mapping[str, float]:
        if not self._attached:
            self._server.attach_storage("dynamic", HiCache(extra_config=extra_config(self._daemon.socket)).extra())
            self._attached = True
            eventually(
                lambda: any(w.pools for w in self._daemon.status().workers), 30, "the worker is attached to kvd"
            )
            self._settle()
        figures = {COLD: self._cold(prompt), DEVICE: self._ask(prompt, "device")}
        self._server.flush_cache()
        return {**figures, KVD: self._ask(prompt, "storage")}

    def _settle(self) -> None:
        """What only the first request after a change pays for is in nobody's time."""
        prompt = random.choices(WORDS, k=2 * PAGE_TOKENS)
        if self._attached:
            self._cold(prompt)
        else:
            self._ask(prompt, "")
        self._server.flush_cache()

    def _cold(self, prompt: Sequence[int]) -> float:
        """Asked while kvd is attached; its pages are in kvd when this returns."""
        wanted = _written(self._daemon) + len(prompt) // PAGE_TOKENS
        seconds = self._ask(prompt, "")
        eventually(lambda: _written(self._daemon) >= wanted, 60, "the prompt's pages are in kvd")
        return seconds

    def _ask(self, prompt: Sequence[int], tier: str) -> float:
        answer = self._server.generate(input_ids=prompt, max_new_tokens=1)
        pages = (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS if tier else 0
        assert _found(answer, tier) == pages, f"{answer.cached} instead of {pages} from {tier or 'nowhere'}"
        return answer.ttft_s


def _found(answer: Generation, tier: str) -> int:
    return int(getattr(answer.cached, tier)) if tier else answer.cached.total


def _written(daemon: Daemon) -> int:
    """Pages ever written: those that left again count too."""
    ram = daemon.status().tiers[0]
    return ram.pages + ram.evicted


def _add_rows(table: Table, length: int, samples: Samples) -> None:
    for name in (PLAIN, COLD, DEVICE, KVD):
        sooner, later = samples.ratio(COLD, name), samples.ratio(name, DEVICE)
        table.add(
            str(length), name, spread(samples.rounds.get(name)),
            "" if sooner is None else f"{sooner:.2f}",
            "" if later is None else f"{later:.2f}",
        )  # fmt: skip


def _report(table: Table, results: Mapping[int, Samples], wanted: Options) -> None:
    key = results[KEY]
    ratios = {
        "kvd_vs_device": key.ratio(KVD, DEVICE),
        "cold_vs_kvd_1500": key.ratio(COLD, KVD),
        "attached_vs_plain": key.ratio(COLD, PLAIN),
    }
    table.notes.append(
        "rounds: " + ", ".join(f"{len(samples.rounds[COLD])} of {length}" for length, samples in results.items())
    )
    table.notes += [f"{name}: {value:.3f}" for name, value in ratios.items() if value is not None]
    figures = {
        f"{length} {name}": samples.median(name) for length, samples in results.items() for name in samples.rounds
    }
    finish("ttft", table, wanted, ratios, figures)


if __name__ == "__main__":
    main()
