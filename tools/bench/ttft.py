"""How long until the first token: cold, from the worker's own device cache, and from kvd? And does kvd slow a worker?

Two real SGLang servers with a small real model (SmolLM2-135M, float32, pages of 64 tokens): one with a HiCache and no
storage, one with kvd behind it. They are asked the same prompt, one at a time and in turn; every round has a prompt
of fresh random tokens, so cold is cold. The second server is then asked again, from its own device cache and, after
/flush_cache, from kvd alone. A round goes on when the pages are written: writing is not in anybody's time.

Ratios, all at 1.5k tokens: `kvd_vs_device`, a hit in kvd next to a hit in the device cache; `cold_vs_kvd_1500`, how
many times sooner the token comes than cold; `attached_vs_plain`, a cold prompt with kvd attached next to one without.

On a CPU, SGLang's torch_native attention computes over cached tokens too (a GPU's does not), so all caches gain less
here than they would there: `kvd_vs_device` is what to look at. Starting the servers is set-up, about a minute.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

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
    with ExitStack() as stack:
        daemon = stack.enter_context(_daemon())
        plain, attached = _servers(stack, daemon)
        for length in LENGTHS:
            if rounds := wanted.rounds(*LENGTHS[length]):
                progress(f"{length} tokens, {rounds} rounds")
                results[length] = _measure(length, rounds, plain, attached, daemon)
    for length, samples in results.items():
        _add_rows(table, length, samples)
    _report(table, results, wanted)


@contextmanager
def _daemon() -> Iterator[Daemon]:
    with scratch() as folder, running_daemon(folder / "run", ARENA_MIB) as daemon:
        yield daemon


def _servers(stack: ExitStack, daemon: Daemon) -> tuple[SglangServer, SglangServer]:
    """Without kvd, and with it; both ready."""
    with_kvd = HiCache(storage_backend="dynamic", extra_config=extra_config(daemon.socket))
    servers = (
        SglangServer(VENV, MODEL, _log("plain"), page_size=PAGE_TOKENS, hicache=HiCache()),
        SglangServer(VENV, MODEL, _log("kvd"), page_size=PAGE_TOKENS, hicache=with_kvd),
    )
    progress("starting two servers")
    for server in servers:
        stack.callback(server.stop)
        server.start()
    for server in servers:
        server.wait_ready()
    eventually(lambda: any(w.pools for w in daemon.status().workers), 30, "the worker is attached to kvd")
    return servers


def _log(name: str) -> Path:
    return LOGS / f"bench-ttft-{name}.log"


def _measure(length: int, rounds: int, plain: SglangServer, attached: SglangServer, daemon: Daemon) -> Samples:
    pages = (length - 1) // PAGE_TOKENS * PAGE_TOKENS

    def ask(server: SglangServer, prompt: Sequence[int], tier: str) -> float:
        answer = server.generate(input_ids=prompt, max_new_tokens=1)
        assert _found(answer, tier) == (pages if tier else 0), f"{answer.cached} instead of {pages} from {tier}"
        return answer.ttft_s

    def cold(server: SglangServer, prompt: Sequence[int]) -> float:
        written = _written(daemon) + length // PAGE_TOKENS
        seconds = ask(server, prompt, "")
        if server is attached:  # else writing takes time from whoever is asked next
            eventually(lambda: _written(daemon) >= written, 60, "the prompt's pages are in kvd")
        return seconds

    def round_(number: int) -> Mapping[str, float]:
        prompt = random.choices(WORDS, k=length)
        order = ((PLAIN, plain), (COLD, attached))
        figures = {name: cold(server, prompt) for name, server in order[:: -1 if number % 2 else 1]}
        figures[DEVICE] = ask(attached, prompt, "device")
        attached.flush_cache()
        figures[KVD] = ask(attached, prompt, "storage")
        plain.flush_cache()
        attached.flush_cache()
        return figures

    return interleave([round_], rounds)


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
