"""How long after kill -9 does the NVMe tier give back its first page, with 10**4, 10**5 and 10**6 pages in it?

"tier": a process that holds the tier open is killed in the middle of a put; another one, already running, opens it and
gets a page: seconds from the one to the other. Nothing but the catalog is read.

"kvd": a whole daemon over such a folder is killed, its memory (the RAM tier) is lost too, and it is started again:
seconds from exec until a worker, which was attached before and attaches again by itself, has found a page by a lookup
and read it. Of that "ready" is until the daemon answers; then its tier's process is started, opens the tier and says
all names that it holds, and the daemon enters them into its index.

The folders hold pages of 4 KiB of zeros, made without writing each of them: their catalog and segments are the tier's.
"""

import argparse
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xxhash

from kvd.errors import KvdError
from kvd.storage.nvme import NvmeTier
from kvd.storage.nvme.catalog import Catalog, Record
from kvd.storage.nvme.segments import Segments
from kvd.storage.nvme.sizeclass import POSITION_BITS
from kvd.storage.tier import Page
from tests.harness import Daemon, eventually
from tools.bench._kvd import attach, fresh_keys, scratch, slots
from tools.bench._table import MIB, ROOT, Run, Table, finish, interleave, options, progress, spread
from tools.bench._workers import small_pool

PAGE = 4096
SEGMENT = 64 * MIB
COUNTS = (10_000, 100_000, 1_000_000)
KVD_COUNTS = COUNTS[1:]
BATCH = 8192
TYPICAL = 256 << 10  # bytes of a page below RAM by which kvd sizes its index: the tier may hold as many as these


def main() -> None:
    wanted = options(__doc__, _add_options)
    table = Table("Reopening after kill -9: seconds until the first page, median (min..max)",
                  ("pages", "what", "seconds", "of it opened / ready", "pages held"))  # fmt: skip
    with scratch(wanted.rest.dir) as folder, ExitStack() as stack:
        first: dict[int, bytes] = {}
        for count in COUNTS:
            progress(f"making {count} pages")
            first[count] = make(folder / str(count), count)
            _kill_in_a_put(folder / str(count), count)
        tiers = interleave([_tier_case(folder / str(n), n, first[n]) for n in COUNTS], wanted.rounds(3, 11))
        nodes = [stack.enter_context(Node(folder, count)) for count in KVD_COUNTS]
        started = interleave([node.case for node in nodes], wanted.rounds(2, 7), warm_up=0)
    figures: dict[str, float] = {}
    for samples, what, parts in ((tiers, "tier", ("s", "open_s")), (started, "kvd", ("kvd_s", "ready_s"))):
        for count in COUNTS if what == "tier" else KVD_COUNTS:
            cells = [spread(samples.rounds.get(f"{part}_{count}"), 3) for part in parts]
            held = int(samples.median(f"held_{count}") or 0)
            table.add(f"{count}", what, *cells, f"{held}")
            figures |= {f"{part}_{count}": round(samples.median(f"{part}_{count}") or 0, 4) for part in parts}
    table.notes.append("the kernel's cache holds the catalog, as it does after a crash of the process alone")
    finish("reopen", table, wanted, {}, figures)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="a folder on the disk in question")


def size_of(count: int) -> int:
    """Bytes that a tier may take for as many pages of usual size; these take less."""
    return count * TYPICAL + 4 * SEGMENT


def opened(folder: Path, count: int) -> NvmeTier:
    return NvmeTier(folder, size_of(count), SEGMENT)


def make(folder: Path, count: int) -> bytes:
    """A folder with pages of zeros in it, which segments that were never written to are full of. Returns a name."""
    opened(folder, count).close()
    catalog = Catalog(folder / "catalog", SEGMENT, max(1 << 30, size_of(count) // 8))
    segments = Segments(folder, SEGMENT, catalog.uuid)
    checksum = (xxhash.xxh3_128_digest(bytes(PAGE)),)
    per = segments.slots_of(PAGE)
    for number in range(-(-count // per)):
        segments.create(number, PAGE)
    names = sorted(os.urandom(48) for _ in range(count))
    for at in range(0, count, BATCH):
        pages = [Page(name[:16], name[16:], bytes(32), PAGE, checksum) for name in names[at : at + BATCH]]
        places = [(n // per) << POSITION_BITS | n % per for n in range(at, at + len(pages))]
        assert catalog.commit([Record(place, 1, page) for place, page in zip(places, pages, strict=True)])
    segments.close()
    catalog.close()
    return names[count // 2]


def _kill_in_a_put(folder: Path, count: int) -> None:
    code = (
        f"from pathlib import Path; from tools.bench.reopen import put_forever as f; f(Path({str(folder)!r}), {count})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert said == b"putting\n", "the process that puts ended"


def put_forever(folder: Path, count: int) -> None:
    """Runs in that process: never returns."""
    buffer = memoryview(mmap.mmap(-1, PAGE))
    checksum = (xxhash.xxh3_128_digest(buffer),)
    tier = opened(folder, count)
    while True:
        assert all(tier.put([(Page(bytes(16), os.urandom(32), bytes(32), PAGE, checksum), [buffer])]))
        print("putting", flush=True)


def _tier_case(folder: Path, count: int, name: bytes) -> Run:
    def case(_: int) -> Mapping[str, float]:
        buffer = memoryview(mmap.mmap(-1, PAGE))
        started = time.perf_counter()
        tier = opened(folder, count)
        open_s = time.perf_counter() - started
        found = tier.get([(name, [buffer])])
        first_s = time.perf_counter() - started
        held = tier.usage().pages
        tier.close()
        assert found[0] is not None
        assert held >= count
        return {f"s_{count}": first_s, f"open_s_{count}": open_s, f"held_{count}": float(held)}

    return case


class Node:
    """A daemon over such a folder and a worker attached to it, with one page more of the worker's own. A context."""

    def __init__(self, folder: Path, count: int) -> None:
        self._count = count
        self._daemon = Daemon(
            folder / f"run{count}", 64, nvme__path=folder / str(count), nvme__size_bytes=size_of(count),
            nvme__segment_bytes=SEGMENT, nvme__write_delay_s=0,
        )  # fmt: skip
        self._keys = fresh_keys(1)

    def __enter__(self) -> "Node":
        self._daemon.start()
        self._pool = small_pool()
        self._plugin = attach(self._daemon, self._pool, warm=False)
        self._slots = slots(self._pool, [0])
        eventually(lambda: not self._tier().trouble, 60, "the tier works")
        held = self._tier().pages
        assert all(self._plugin.batch_set_v1(self._keys, self._slots))
        eventually(lambda: self._tier().pages > held, 20, "the page is on the disk")
        return self

    def __exit__(self, *_: object) -> None:
        self._plugin.close()
        self._daemon.stop()

    def _tier(self) -> Any:
        return self._daemon.status().tiers[1]

    def case(self, _: int) -> Mapping[str, float]:
        daemon = self._daemon
        daemon.kill()
        daemon.arena_path.unlink()
        started = time.perf_counter()
        seconds = {}
        daemon.start(wait=False)
        for what, reached in self._stages():
            eventually(reached, 120, what)
            seconds[what] = time.perf_counter() - started
        held = self._tier()
        assert held.pages > self._count
        return {f"{what}_{self._count}": value for what, value in seconds.items()} | {
            f"held_{self._count}": held.pages
        }

    def _stages(self) -> Iterator[tuple[str, Callable[[], bool]]]:
        """In their order."""

        def ready() -> bool:
            try:
                return bool(self._tier().name)
            except KvdError:
                return False

        def first() -> bool:
            found = self._plugin.batch_exists(self._keys) == 1
            return found and self._plugin.batch_get_v1(self._keys, self._slots) == [True]

        yield "ready_s", ready
        yield "kvd_s", first


if __name__ == "__main__":
    main()
