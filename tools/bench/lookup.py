"""How long does a prefix lookup take, alone and among eight busy workers?

`batch_exists` through the real plugin for chains of 16, 512 and 8192 pages: all held, the first half held, none held.
Beside it a bare round trip of 48 bytes to an echo process, over a unix stream and over ZeroMQ DEALER/ROUTER: what a
lookup would cost at least if it sent a message. Microseconds; every process has its own plugin and its own session.

    alone    one worker, call after call
    eight    eight workers at once, 100 lookups a second each at random offsets: more than busy prefill workers ask
    loaded   the same, while a ninth process stores and reads back batches of 64 pages of 1 MiB, ten a second
             (1.3 GB/s through the daemon), so that its messages, the daemon and ten processes share the CPUs

p50 is the median of the rounds' medians; p99 is taken over all calls of all rounds and workers.
"""

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch

from tests.harness import Daemon, eventually
from tools.bench._kvd import MIB, attach, fresh_keys, scratch, slots
from tools.bench._table import Run, Samples, Table, finish, interleave, options, progress
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
        busy = fork(mover, daemon, MOVED_PAGES, MOVES_PER_S)
        stack.callback(daemon.stop)
        daemon.start()
        eventually(lambda: daemon.status().tiers[0].prefaulted_bytes >= ARENA_MIB * MIB, 60)
        progress("storing 16384 pages")
        stack.callback(_fill(daemon, held))
        for process in (*workers, busy):
            process.tell("attach")
        for process in (*workers, busy):
            assert process.hear() == "ready"
        times: dict[str, list[float]] = {}
        cases = _cases(workers, busy, times, 100 if wanted.quick else 400)
        samples = interleave(cases, wanted.rounds(3, 9))
    _report(samples, times, wanted.json)


def _fill(daemon: Daemon, held: Held) -> Callable[[], None]:
    pool = small_pool()
    plugin = attach(daemon, pool)
    for chain in (*held.chains, held.long):
        assert all(plugin.batch_set_v1(chain, slots(pool, [page % 128 for page in range(len(chain))]))), plugin.stats()
    return plugin.close


def _cases(workers: list[Process], busy: Process, times: dict[str, list[float]], count: int) -> list[Run]:
    def record(name: str, new: list[float], number: int) -> Mapping[str, float]:
        if number >= 0:
            times.setdefault(name, []).extend(new)
        return {name: statistics.median(new)}

    def alone(task: Task, number: int) -> Mapping[str, float]:
        workers[0].tell(Task(task.what, task.keys, count))
        return record(_name("alone", task), workers[0].hear(), number)

    def eight(task: Task, number: int, place: str = "eight") -> Mapping[str, float]:
        for process in workers:
            process.tell(Task(task.what, task.keys, max(20, count // 4), RATE))
        return record(_name(place, task), [time for process in workers for time in process.hear()], number)

    def loaded(task: Task, number: int) -> Mapping[str, float]:
        busy.tell("go")
        found = eight(task, number, "loaded")
        busy.tell("halt")
        moved = busy.hear()
        busy.tell("go")  # leaves its inner loop on the next message
        return {**found, "moved": moved}

    del loaded
    ours = [partial(alone, task) for task in (*LOOKUPS, *BARE)]
    return [*ours, *(partial(eight, task) for task in (*LOOKUPS, *BARE))]


def _name(place: str, task: Task) -> str:
    return f"{place} {task.what} {task.keys}" if task.keys else f"{place} {task.what}"


def _report(samples: Samples, times: dict[str, list[float]], json: bool) -> None:
    raise NotImplementedError
