"""How long does a prefix lookup take, alone and among eight busy workers?

`batch_exists` through the real plugin for chains of 16, 512 and 8192 pages: all held, the first half held, none held.
Beside it a bare round trip of 48 bytes to an echo process, over a unix stream and over ZeroMQ DEALER/ROUTER: what a
lookup would cost at least if it sent a message. Microseconds; every process has its own plugin and its own session.

    alone    one worker, call after call
    eight    eight workers at once, 100 lookups a second each at random offsets: more than busy prefill workers ask
    loaded   the same, while a ninth process stores and reads back batches of 64 pages of 1 MiB, up to ten a second
             (1.3 GB/s), in an arena that is full: so the daemon evicts all the time, and ten processes share the CPUs

p50 is the median of the rounds' medians; p99 is taken over all calls of all rounds and workers.
"""

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from tests.harness import Daemon, eventually
from tools.bench._kvd import attach, fresh_keys, scratch, slots
from tools.bench._table import MIB, Options, Run, Samples, Table, finish, interleave, options, progress, spread
from tools.bench._workers import Held, Process, Task, mover, small_pool, unix_echo, worker, zmq_echo

WORKERS = 8
RATE = 100.0
MOVED_PAGES, MOVES_PER_S = 64, 10.0
LOOKUPS = [Task(what, keys) for keys in (16, 512, 8192) for what in ("hit", "half", "miss")]
BARE = [Task("unix"), Task("zmq")]
ARENA_MIB = 1024  # the index is sized for pages of 64 KiB: 32768 entries


def main() -> None:
    wanted = options(__doc__)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        daemon = Daemon(folder / "kvd", arena_mib=ARENA_MIB, extent_mib=64)
        held = Held([fresh_keys(512) for _ in range(16)], fresh_keys(8192))

        def fork(target: Callable[..., None], *arguments: object) -> Process:
            process = Process(target, *arguments)
            stack.callback(process.stop)
            return process

        for echo in (unix_echo, zmq_echo):
            assert fork(echo, folder).hear() == "ready"
        workers = [fork(worker, daemon, folder, held) for _ in range(WORKERS)]
        busy = fork(mover, daemon, held, MOVED_PAGES, MOVES_PER_S)
        stack.callback(daemon.stop)
        daemon.start()
        eventually(lambda: daemon.status().tiers[0].prefaulted_bytes >= ARENA_MIB * MIB, 60)
        progress("storing 16384 pages")
        stack.callback(_fill(daemon, held))
        for process in (*workers, busy):
            process.tell("attach")
        for process in (*workers, busy):
            assert process.hear() == "ready"
        clock = _Clock(workers, busy, 200 if wanted.quick else 400)
        samples = interleave(clock.cases(), wanted.rounds(3, 9))
    _report(samples, clock.times, wanted)


def _fill(daemon: Daemon, held: Held) -> Callable[[], None]:
    pool = small_pool()
    plugin = attach(daemon, pool)
    for chain in (*held.chains, held.long):
        assert all(plugin.batch_set_v1(chain, slots(pool, [page % 128 for page in range(len(chain))]))), plugin.stats()
    return plugin.close


class _Clock:
    """Makes the cases; keeps every call's time by case."""

    def __init__(self, workers: list[Process], busy: Process, count: int) -> None:
        self.times: dict[str, list[float]] = {}
        self._workers = workers
        self._busy = busy
        self._count = count

    def cases(self) -> list[Run]:
        runs: list[Run] = []
        for task in (*LOOKUPS, *BARE):
            runs += [partial(self._alone, task), partial(self._eight, "eight", task)]
        return [*runs, *(partial(self._loaded, task) for task in (Task("hit", 512), *BARE))]

    def _alone(self, task: Task, number: int) -> Mapping[str, float]:
        self._workers[0].tell(replace(task, count=self._count))
        return self._keep(f"alone {task.name}", self._workers[0].hear(), number)

    def _eight(self, place: str, task: Task, number: int) -> Mapping[str, float]:
        for process in self._workers:
            process.tell(replace(task, count=self._count // 4, rate=RATE))
        return self._keep(f"{place} {task.name}", [t for process in self._workers for t in process.hear()], number)

    def _loaded(self, task: Task, number: int) -> Mapping[str, float]:
        self._busy.tell("go")
        found = self._eight("loaded", task, number)
        self._busy.tell("halt")
        return {**found, f"moved {task.name}": self._busy.hear()}

    def _keep(self, name: str, times: list[float], number: int) -> Mapping[str, float]:
        if number >= 0:
            self.times.setdefault(name, []).extend(times)
        return {name: statistics.median(times)}


def _report(samples: Samples, times: dict[str, list[float]], wanted: Options) -> None:
    title = "batch_exists: microseconds, p50 (min..max of the rounds) and p99"
    table = Table(title, ("case", "alone p50", "p99", "eight p50", "p99", "loaded p50", "p99"))
    for task in (*LOOKUPS, *BARE):
        cells: list[str] = []
        for place in ("alone", "eight", "loaded"):
            name = f"{place} {task.name}"
            measured = name in times
            cells += [spread(samples.rounds[name], 1), f"{_p99(times[name]):.0f}"] if measured else ["", ""]
        table.add(task.name, *cells)
    moved = [batches for name, rounds in samples.rounds.items() if name.startswith("moved") for batches in rounds]
    table.notes.append(
        f"loaded: {MOVED_PAGES} pages of 1 MiB set and got {statistics.median(moved):.0f} times a case and round"
    )
    figures = {f"{name} p50_us": round(samples.median(name) or 0, 1) for name in times}
    figures |= {f"{name} p99_us": round(_p99(values), 1) for name, values in times.items()}
    figures["p99_ms"] = round(_p99(times["loaded 512 hit"]) / 1000, 3)
    ratios = {"p50_512_vs_unix": samples.ratio("alone 512 hit", "alone bare unix trip")}
    table.notes.append(f"alone, 512 held keys: {ratios['p50_512_vs_unix']:.2f} x a bare unix-stream round trip")
    finish("lookup", table, wanted, ratios, figures)


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


if __name__ == "__main__":
    main()
