"""How fast does the NVMe tier take pages in and give them back, next to what fio gets out of the same disk?

Sustained durable writes (batches of 128 MiB, each with barrier and commit, into a full tier, so that every batch also
evicts) and random cold reads with checksums, O_DIRECT both, in GB/s (1e9 bytes), by page size and by how many reads or
writes are in flight. With the same depth, into a file beside it of the same size, and out of the tier's own segments
(for what a read costs depends on where a file lies, and on what a virtual machine's host has cached of it):

    fio  libaio, O_DIRECT, in order and round the file, fdatasync after every 128 MiB; it has as many buffers as are in
         flight, so they stay in the processor's cache, where pages that come from an arena are not.
    raw  pwritev and preadv of as many threads, from and to as much memory as the tier's batches take, one fdatasync
         per batch; no catalog, no checksums, no eviction: what a tier of these calls could reach at best.

Also next to LMDB, RocksDB (blob files), SQLite, SGLang's `file` backend and LMCache's local disk, see _disk_peers.py.
These take turns with ours and fio in rounds of their own: what they leave behind on a disk is felt by who comes next.
Write amplification is what /proc/self/io says this process sent to the disk per byte of pages. CPU is of all threads.
"""

import argparse
import os
import random
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import xxhash

from kvd.storage.nvme import NvmeTier
from kvd.storage.nvme.segments import ALIGN
from kvd.storage.tier import Page
from tools.bench._disk_peers import PEERS, VALUES, peer_case
from tools.bench._fio import Fio
from tools.bench._kvd import scratch
from tools.bench._peers import Missing
from tools.bench._raw import RawFile, shared_buffers
from tools.bench._table import MIB, Options, Run, Samples, Table, finish, interleave, options, progress, spread

BATCH_BYTES = 128 * MIB
SIZES = {"1 MiB": MIB, "2.6 MiB": 42 * 2 * 64 * 256 * 2, "8 MiB": 8 * MIB}  # 2.6: 64 tokens, 42 layers, 2 heads
KEY, KEY_DEPTH = "1 MiB", 4  # what the ratios are of; 4 is the tier's default
DEPTHS = (1, 4, 16)


def main() -> None:
    wanted = options(__doc__, _add_options)
    table = Table("NVMe tier: GB/s, median (min..max)", ("pages", "case", "write", "read", "write/fio", "read/fio",
                                                         "CPU s/GB write", "CPU s/GB read"))  # fmt: skip
    results: dict[str, Samples] = {}
    beside = Samples()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch(wanted.rest.dir))
        for name in [KEY] if wanted.quick else SIZES:
            results[name], others = _measure(name, folder / name.replace(" ", ""), wanted, table)
            _add_rows(table, name, results[name])
            if name == KEY:
                beside = others
                _add_rows(table, f"{name}, peers", beside, _peers(wanted))
    one, ours = results[KEY], f"kvd qd{KEY_DEPTH}"
    ratios = {
        f"{what}_vs_{reference.split()[0].replace('-', '_')}": of.ratio(f"{ours} {what}", f"{reference} {what}")
        for of, references in ((one, (f"fio qd{KEY_DEPTH}", f"raw qd{KEY_DEPTH}")), (beside, PEERS))
        for reference in references
        for what in ("write", "read")
    }
    for peer in PEERS:
        if (unsynced := beside.median(f"{peer} unsynced")) is not None:
            table.notes.append(
                f"{peer} writes {unsynced:.2f} GB/s into the kernel's cache, before anything is durable"
            )
    table.notes.append(f"write amplification at {KEY}: {one.median('write_amplification') or 0:.3f}")
    table.notes.append(f"this run kept {_tier_bytes(wanted) // MIB} MiB per case in {wanted.rest.dir}")
    figures = {f"{size} {name}": round(samples.median(name) or 0, 4)
               for size, samples in results.items() for name in samples.rounds}  # fmt: skip
    figures["write_amplification"] = round(one.median("write_amplification") or 0, 4)
    finish("nvme", table, wanted, ratios, figures)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="a folder on the disk in question")
    parser.add_argument("--no-peers", action="store_true", help="only kvd, fio and raw")


def _tier_bytes(wanted: Options) -> int:
    return (768 if wanted.quick else 1536) * MIB


def _peers(wanted: Options) -> Sequence[str]:
    """The file backends take half a minute to import what they need: --quick leaves them out."""
    return () if wanted.rest.no_peers else VALUES if wanted.quick else PEERS


def _measure(name: str, folder: Path, wanted: Options, table: Table) -> tuple[Samples, Samples]:
    """Ours, fio and raw; and, at the key size, the key depth of ours and fio beside the peers."""
    page_bytes, size = SIZES[name], _tier_bytes(wanted)
    batch = BATCH_BYTES // page_bytes
    pages = 2 * batch
    depths = (1, KEY_DEPTH) if wanted.quick else DEPTHS
    progress(f"{name}: {pages} pages a round, {len(depths)} depths")
    folder.mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        cases: list[Run] = []
        beside: list[Run] = []
        try:
            fio = Fio(folder, size)
        except Missing as why:
            fio = None
            table.notes.append(f"fio is missing: {why}")
        raw = stack.enter_context(RawFile(folder / "raw.bin", size, page_bytes, BATCH_BYTES))
        for depth in depths:
            tier = NvmeTier(folder / f"tier{depth}", size, threads=depth)
            stack.callback(tier.close)
            mine = [_tier_case(depth, tier, page_bytes, pages)]
            segments = sorted((folder / f"tier{depth}").glob("segment-*"))
            if fio is not None:
                mine.append(_fio_case(depth, fio, page_bytes, pages, segments))
            if depth == KEY_DEPTH:
                beside += mine
            cases += [*mine, raw.case(depth, pages, segments, ALIGN)]
        samples = interleave(cases, wanted.rounds(3, 5))
        if name == KEY and _peers(wanted):
            for kind in _peers(wanted):
                held = size // page_bytes
                try:
                    beside.append(stack.enter_context(peer_case(kind, folder, page_bytes, held, batch, batch)))
                except Missing as why:
                    table.notes.append(f"{kind} is missing: {why}")
            return samples, interleave(beside, wanted.rounds(3, 5))
        return samples, Samples()


class Pages:
    """Endless pages with the same bytes under fresh names: what a disk that does not look inside cannot tell."""

    def __init__(self, page_bytes: int) -> None:
        slot, self.count = -(-page_bytes // 4096) * 4096, BATCH_BYTES // page_bytes
        buffers = shared_buffers(2 * self.count, slot)
        self.sources, self.targets = buffers[: self.count], buffers[self.count :]
        rng = random.Random(page_bytes)
        for buffer in (*self.sources, *self.targets):
            buffer[:page_bytes] = rng.randbytes(page_bytes)
        self._length = page_bytes
        self._sums = [xxhash.xxh3_128_digest(buffer[:page_bytes]) for buffer in self.sources]
        self.stored: list[bytes] = []

    def batch(self) -> list[tuple[Page, list[memoryview]]]:
        found = []
        for buffer, checksum in zip(self.sources, self._sums, strict=True):
            page = Page(bytes(16), os.urandom(32), bytes(32), self._length, (checksum,))
            self.stored.append(page.name)
            found.append((page, [buffer]))
        return found

    def forget(self, left: Iterable[bytes]) -> None:
        gone = set(left)
        self.stored = [name for name in self.stored if name not in gone]


def _tier_case(depth: int, tier: NvmeTier, page_bytes: int, pages: int) -> Run:
    stock, total = Pages(page_bytes), pages * page_bytes / 1e9
    while not (left := tier.news().left):  # full, so that what follows is its steady state
        assert all(tier.put(stock.batch()))
    stock.forget(left)

    def case(_: int) -> Mapping[str, float]:
        batches = [stock.batch() for _ in range(0, pages, stock.count)]
        sent, cpu, started = _bytes_sent(), time.process_time(), time.perf_counter()
        for batch in batches:
            assert all(tier.put(batch))
        write_s, write_cpu = time.perf_counter() - started, time.process_time() - cpu
        sent = _bytes_sent() - sent
        stock.forget(tier.news().left)
        asked = random.sample(stock.stored, pages)
        wanted = [asked[at : at + stock.count] for at in range(0, pages, stock.count)]
        cpu, started = time.process_time(), time.perf_counter()
        for names in wanted:
            found = tier.get([(name, [target]) for name, target in zip(names, stock.targets, strict=True)])
            assert all(found), tier.counters
        read_s, read_cpu = time.perf_counter() - started, time.process_time() - cpu
        figures = {
            f"kvd qd{depth} write": total / write_s, f"kvd qd{depth} read": total / read_s,
            f"kvd qd{depth} write cpu": write_cpu / total, f"kvd qd{depth} read cpu": read_cpu / total,
        }  # fmt: skip
        return {**figures, "write_amplification": sent / 1e9 / total} if depth == KEY_DEPTH else figures

    return case


def _bytes_sent() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("write_bytes")))


def _fio_case(depth: int, fio: Fio, page_bytes: int, pages: int, segments: Sequence[Path]) -> Run:
    total = pages * page_bytes

    def case(_: int) -> Mapping[str, float]:
        wrote = fio.write(page_bytes, depth, total, BATCH_BYTES)
        read = fio.read(page_bytes, depth, total, segments, ALIGN)
        return {
            f"fio qd{depth} write": wrote.bytes_per_s / 1e9, f"fio qd{depth} read": read.bytes_per_s / 1e9,
            f"fio qd{depth} write cpu": wrote.cpu_s / total * 1e9, f"fio qd{depth} read cpu": read.cpu_s / total * 1e9,
        }  # fmt: skip

    return case


def _add_rows(table: Table, size: str, samples: Samples, peers: Sequence[str] = ()) -> None:
    names = [name.removesuffix(" write") for name in samples.rounds if name.endswith(" write")]
    for name in [*names, *(peer for peer in peers if peer not in names)]:
        depth = name.split()[-1] if " " in name else f"qd{KEY_DEPTH}"
        ratios = [samples.ratio(f"{name} {what}", f"fio {depth} {what}") for what in ("write", "read")]
        cpu = [samples.median(f"{name} {what} cpu") for what in ("write", "read")]
        cells = [spread(samples.rounds.get(f"{name} {what}")) for what in ("write", "read")]
        table.add(size, name, *cells, *("" if value is None else f"{value:.2f}" for value in (*ratios, *cpu)))


if __name__ == "__main__":
    main()
