"""Load or recompute: with kvd's prefix on a disk of any speed, is the first token ever later than without kvd?

One real SGLang server (SmolLM2-135M, float32, pages of 64 tokens) with kvd behind its HiCache. Every round has a
conversation of fresh random tokens: it is asked cold, its pages are in nobody's cache, which is the recompute; when
they are on disk, kvd's memory and the server's caches are emptied, and the conversation is asked again with another
question at its end, so that what can be had of it is on disk alone. Then a fresh one of the same length is asked cold
again. `ratio` is with kvd / the mean of the two recomputes around it, and the median of the rounds' own;
`worst_vs_recompute` is the worst of those. `again` is the second recompute / the first: how far two requests differ
between which there is no difference.

Reads of the tier's process are slowed down by the kernel (cgroup `blkio`) for root, else by pacing its preadv
(tests/slow_disk.c). For each speed kvd is started anew, and its first load is of the longest prompt. That is the row
"first", and not in the ratio; nor is the last row, a disk that turns slow under a kvd that knows it as fast. At the
slowest speed loading cannot pay here.

Starting the server is set-up, about half a minute.
"""

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from kvd.daemon.gate import WORDS
from tests.harness import Daemon, eventually
from tests.slow_disk import MISSING, SlowDisk
from tools.bench._kvd import empty, scratch
from tools.bench._table import MIB, ROOT, Options, Samples, Table, finish, interleave, options, progress, spread
from tools.bench._throttle import KernelThrottle, available
from tools.demo.node import LOGS, MODEL, PAGE_TOKENS, VENV, extra_config
from tools.sglang_cpu.server import HiCache, SglangServer

SPEEDS = {"5": 5e6, "20": 20e6, "200": 200e6, "2000": 2000e6}  # MB/s: bytes a second
QUICK_SPEEDS = ("20", "200", "2000")
LENGTHS = {500: (2, 12), 1500: (0, 6)}  # prompt tokens: rounds with --quick, and without
SLOWEST = "5"
QUESTION_TOKENS = 80  # at least a page: what is computed beside a hit shows what the cached tokens cost
TOKENS = range(1_000, 40_000)  # ids of plain text
COLD, KVD, LOADED, HELD = "recomputed", "with kvd", "pages loaded", "pages on disk"
BEFORE, AFTER = "recomputed before", "recomputed after"


def main() -> None:
    wanted = options(
        __doc__, lambda parser: parser.add_argument("--speed", action="append", choices=SPEEDS, help="MB/s; repeat it")
    )
    if not (VENV / "bin/python").exists() or not (MODEL / "model.safetensors").exists():
        sys.exit("there is no SGLang here: run `make sglang`")
    lengths = {length: rounds for length, both in LENGTHS.items() if (rounds := wanted.rounds(*both))}
    longest = max(lengths)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        disk = KernelThrottle(folder) if available() else PacedDisk(folder)
        stack.callback(disk.close)
        daemon = Daemon(
            folder / "run", 768, 64, nvme__path=folder / "nvme", nvme__size_bytes=6144 * MIB, nvme__write_delay_s=0.1
        )
        daemon.env |= disk.environment
        stack.callback(daemon.stop)
        daemon.start()
        server = stack.enter_context(_server(daemon.socket))
        asked = Asked(server, daemon, disk)
        asked.cold(fresh(longest))  # what only the first request pays for
        report = Report()
        for name in wanted.rest.speed or (QUICK_SPEEDS if wanted.quick else SPEEDS):
            progress(f"{name} MB/s")
            asked.forget_the_disk(SPEEDS[name])
            report.add(asked, name, f"{longest} first", interleave([partial(asked.round, longest)], 1, warm_up=0))
            for length, rounds in lengths.items():
                samples = interleave([partial(asked.round, length)], rounds, warm_up=0)
                report.add(asked, name, f"{length}", samples, counts=True)
        if not wanted.quick:
            disk.set(SPEEDS[SLOWEST])
            samples = interleave([partial(asked.round, longest)], 1, warm_up=0)
            report.add(asked, f"turns to {SLOWEST}", f"{longest} first", samples)
    report.table.notes.append(f"reads are slowed down by {disk.how}; rows with counts of decisions, by their reason")
    report.finish(wanted)


class Report:
    """The table, row by row, and the ratios that count."""

    def __init__(self) -> None:
        self.table = Table(
            "Time to first token in seconds, median (min..max), prefix on a throttled disk",
            (
                "MB/s", "prompt", "recomputed", "with kvd", "ratio", "again", "pages loaded", "of", "because",
                "known: MB/s", "ms per token", "per cached one",
            ),
        )  # fmt: skip
        self._ratios: dict[str, float] = {}
        self._figures: dict[str, object] = {}

    def add(self, asked: "Asked", speed: str, prompt: str, samples: Samples, counts: bool = False) -> None:
        ratio, again = samples.ratio(KVD, COLD), samples.ratio(AFTER, BEFORE)
        known, reasons = asked.known(), asked.take_reasons()
        assert ratio is not None
        assert again is not None
        self.table.add(
            speed, prompt, spread(samples.rounds[COLD]), spread(samples.rounds[KVD]), f"{ratio:.2f}",
            f"{again:.2f}", spread(samples.rounds[LOADED], 0), f"{samples.rounds[HELD][0]:.0f}",
            ", ".join(f"{reason} {count}" for reason, count in reasons.items()), asked.measured(),
            f"{known['prefill_ns_per_token'] / 1e6:.2f}", f"{known['prefill_ns_per_cached_token'] / 1e6:.2f}",
        )  # fmt: skip
        self._figures[f"{speed} MB/s, {prompt}"] = {"ratio": ratio, "again": again, **samples.rounds}
        if counts:
            self._ratios[f"{prompt} tokens at {speed} MB/s"] = ratio

    def finish(self, wanted: Options) -> None:
        worst = max(self._ratios, key=lambda cell: self._ratios[cell])
        self.table.notes.append(f"worst_vs_recompute: {self._ratios[worst]:.3f}, {worst}")
        finish("gate", self.table, wanted, {"worst_vs_recompute": self._ratios[worst]}, self._figures)


class PacedDisk:
    """Where the kernel does not let us: the tier's own preadv, see tests.slow_disk."""

    how = "pacing preadv"

    def __init__(self, folder: Path) -> None:
        if MISSING:
            sys.exit(f"cannot slow a disk down here: no cgroup blkio that may be written, and {MISSING}")
        self._slow = SlowDisk(folder)
        self.environment = self._slow.environment
        self.set = self._slow.set

    def adopt(self, process: int) -> None:
        """It is preloaded into the process."""

    def close(self) -> None:
        """It ends with the process."""


@contextmanager
def _server(socket: Path) -> Iterator[SglangServer]:
    """With kvd behind its HiCache: this checkout's plugin, whatever is installed. Ready."""
    cache = HiCache(storage_backend="dynamic", extra_config=extra_config(socket))
    server = SglangServer(
        VENV, MODEL, LOGS / "bench-gate.log", page_size=PAGE_TOKENS, hicache=cache, env={"PYTHONPATH": str(ROOT)}
    )
    progress("starting a server")
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.stop()


def fresh(count: int) -> list[int]:
    return random.choices(TOKENS, k=count)


class Asked:
    """The server and its kvd, and what they are asked."""

    def __init__(self, server: SglangServer, daemon: Daemon, disk: KernelThrottle | PacedDisk) -> None:
        self._server = server
        self._daemon = daemon
        self._disk = disk
        self._reasons: Counter[str] = Counter()
        self._ready()

    def _ready(self) -> None:
        eventually(
            lambda: any(w.pools and w.circuit == "closed" for w in self._daemon.status().workers), 60,
            "the worker is attached",
        )  # fmt: skip
        eventually(lambda: not self._daemon.status().tiers[1].trouble, 30, "the NVMe tier works")

    def forget_the_disk(self, bytes_per_s: float) -> None:
        """kvd is started anew, without a page in memory, on a disk of this speed that it knows nothing of."""
        self._daemon.kill()
        self._daemon.arena_path.unlink()
        self._disk.set(bytes_per_s)
        self._daemon.start(wait=False)
        assert self._daemon.process is not None
        self._disk.adopt(self._daemon.process.pid)  # before it starts its tier's process
        self._daemon.wait_ready()
        self._ready()

    def round(self, length: int, _: int) -> Mapping[str, float]:
        """A fresh conversation, recomputed, then from disk, and another one recomputed."""
        conversation = fresh(length - QUESTION_TOKENS)
        before_s = self.cold(conversation + fresh(QUESTION_TOKENS))
        self._only_on_disk()
        before = self._daemon.status()
        answer = self._server.generate(input_ids=conversation + fresh(QUESTION_TOKENS), max_new_tokens=1)
        self._server.flush_cache()
        self._written()
        after = self._daemon.status()
        after_s = self.cold(fresh(length))
        held = len(conversation) // PAGE_TOKENS
        change = Counter(after.counters)
        change.subtract(before.counters)
        loaded = change["pages_promoted"]
        reasons = [reason for reason in WORDS if change[f"gate_{reason.replace(' ', '_')}"]]
        self._reasons.update(reasons)
        assert answer.cached.storage <= held * PAGE_TOKENS
        progress(
            f"{length}: recomputed {before_s:.2f} and {after_s:.2f} s, with kvd {answer.ttft_s:.2f} s: "
            f"{', '.join(reasons)}; "
            f"loaded {loaded} of {held}, used {answer.cached.storage // PAGE_TOKENS}; disk {self.measured()} MB/s; "
            f"worker {list(self.known().values())}"
        )
        return {
            BEFORE: before_s, AFTER: after_s, COLD: (before_s + after_s) / 2, KVD: answer.ttft_s,
            LOADED: float(loaded), HELD: float(held),
        }  # fmt: skip

    def cold(self, prompt: Sequence[int]) -> float:
        """Seconds until the first token when nobody has a page of it; they are in kvd afterwards."""
        answer = self._server.generate(input_ids=prompt, max_new_tokens=1)
        assert answer.cached.total == 0, answer.cached
        self._server.flush_cache()
        self._written()
        return answer.ttft_s

    def _written(self) -> None:
        time.sleep(0.15)
        eventually(lambda: not self._daemon.status().tiers[1].counters["waiting_to_be_written"], 60, "all is on disk")

    def _only_on_disk(self) -> None:
        empty(self._daemon)
        self._server.flush_cache()

    def take_reasons(self) -> Counter[str]:
        """Of the gate's decisions since the last call."""
        reasons, self._reasons = self._reasons, Counter()
        return reasons

    def measured(self) -> str:
        """What kvd knows of the disk."""
        return f"{self._daemon.status().tiers[1].counters['loads_bytes_per_s'] / 1e6:.0f}"

    def known(self) -> Mapping[str, int]:
        """What the gate goes by, as far as the worker reports it."""
        (worker,) = self._daemon.status().workers
        return {name: value for name, value in worker.counters.items() if name.startswith("prefill_")}


if __name__ == "__main__":
    main()
