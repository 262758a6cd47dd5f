"""How long after kill -9 does the NVMe tier give back its first page, with 10**4, 10**5 and 10**6 pages in it?

Pages of 4 KiB, which is the worst case: what takes time is their number. A process fills the tier and is killed in the
middle of a put. Another one, already running, then opens it and gets a page: seconds from the one to the other, and
how many pages it then holds. Nothing but the catalog is read.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import xxhash

from kvd.storage.nvme import NvmeTier
from kvd.storage.tier import Page
from tools.bench._kvd import scratch
from tools.bench._table import MIB, ROOT, Run, Table, finish, interleave, options, progress, spread

PAGE = 4096
COUNTS = (10_000, 100_000, 1_000_000)
BATCH = 8192
FIRST = bytes(16) + random.Random(0).randbytes(32)


def main() -> None:
    wanted = options(__doc__, _add_options)
    table = Table("Reopening after kill -9: seconds until the first page, median (min..max)",
                  ("pages", "seconds", "of it opening", "pages held"))  # fmt: skip
    figures: dict[str, float] = {}
    with scratch(wanted.rest.dir) as folder:
        for count in COUNTS:
            progress(f"storing {count} pages")
            _fill(folder / str(count), count)
        samples = interleave([_case(folder / str(count), count) for count in COUNTS], wanted.rounds(3, 11))
        for count in COUNTS:
            held = int(samples.median(f"held_{count}") or 0)
            cells = [spread(samples.rounds.get(f"{what}_{count}"), 3) for what in ("s", "open_s")]
            table.add(f"{count}", *cells, f"{held}")
            figures[f"s_{count}"] = round(samples.median(f"s_{count}") or 0, 4)
        shutil.rmtree(folder / str(COUNTS[0]))
    table.notes.append("the kernel's cache holds the catalog, as it does after a crash of the process alone")
    finish("reopen", table, wanted, {}, figures)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="a folder on the disk in question")


def _size(count: int) -> int:
    return (-(-count * PAGE // (64 * MIB)) + 2) * 64 * MIB


def opened(folder: Path, count: int) -> NvmeTier:
    return NvmeTier(folder, _size(count), 64 * MIB)


def _fill(folder: Path, count: int) -> None:
    """In a process that is killed while it goes on writing."""
    code = f"from pathlib import Path; from tools.bench.reopen import store; store(Path({str(folder)!r}), {count})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert said == b"stored\n", "the process that stores ended"


def store(folder: Path, count: int) -> None:
    """Runs in that process: never returns."""
    buffer = memoryview(mmap.mmap(-1, PAGE))
    checksum = (xxhash.xxh3_128_digest(buffer),)
    tier = opened(folder, count)
    names = iter([FIRST, *(bytes(16) + os.urandom(32) for _ in range(count - 1))])
    stored = 0
    while True:
        part = [
            Page(name[:16], name[16:], bytes(32), PAGE, checksum) for _, name in zip(range(BATCH), names, strict=False)
        ]
        part = part or [Page(bytes(16), os.urandom(32), bytes(32), PAGE, checksum)]
        assert all(tier.put([(page, [buffer]) for page in part]))
        stored += len(part)
        if stored == count:
            print("stored", flush=True)


def _case(folder: Path, count: int) -> Run:
    def case(_: int) -> Mapping[str, float]:
        buffer = memoryview(mmap.mmap(-1, PAGE))
        started = time.perf_counter()
        tier = opened(folder, count)
        open_s = time.perf_counter() - started
        found = tier.get([(FIRST, [buffer])])
        first_s = time.perf_counter() - started
        held = tier.usage().pages
        tier.close()
        assert found[0] is not None
        assert held >= count
        return {f"s_{count}": first_s, f"open_s_{count}": open_s, f"held_{count}": float(held)}

    return case


if __name__ == "__main__":
    main()
