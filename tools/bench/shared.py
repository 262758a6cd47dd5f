"""How fast are sealed Arrow files written and read in ranges, next to plain files and to the bare pyarrow client?

64 pages a put (8 to S3), in GB/s (1e9 bytes), durable. Ours: `SharedTier.put` and `get`, checksums compared, on a
local folder (`--dir`), new pages in every round; a read asks for all pages of the file just written, in an order
of its own, or for one page at a time. What is old is deleted between the rounds, ours and the references'; "full" is
what each does when the disk has no room left: delete the oldest file first, within the time. References, in turn:

    copy      the same bytes into a plain file, 1 MiB a write, then fsync; read back cold, page by page, as `cp` would
    raw       the same with O_DIRECT; reads are preads of the same pages in the same order
    pyarrow   the same pages by pyarrow's own IPC writer into a file, then fsync; read with its file reader, cold

and through S3, where moto's server is installed: the same bytes by the bare pyarrow.fs client, in one object, and
ranged reads of the same pages from it. moto is written in Python and slower when it is asked several things at once,
as we do: its figures bound what we add, and say nothing about S3.
"""

import argparse
import mmap
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from pyarrow import fs

from kvd.storage.shared import SharedTier
from kvd.storage.tier import Page
from tools.bench._kvd import scratch
from tools.bench._peers import Missing
from tools.bench._table import (
    MIB,
    ROOT,
    Options,
    Run,
    Samples,
    Table,
    finish,
    interleave,
    options,
    progress,
    spread,
    timed,
)

PAGES = 64
S3_PAGES = 8
SIZES = {"256 KiB": 256 << 10, "1 MiB": MIB, "8 MiB": 8 * MIB}
KEY = "1 MiB"  # the size that the ratios are of
CASES = ("kvd", "copy", "raw", "pyarrow", "kvd, full", "copy, full")


class Pages:
    """Random bytes for one put, their checksums, and as much room to read into. Each round's keys are new."""

    def __init__(self, length: int, count: int = PAGES) -> None:
        self.length, self.count, self.total = length, count, count * length
        self.source, self.target = (memoryview(mmap.mmap(-1, self.total)) for _ in range(2))
        self.source[:] = np.random.default_rng(1).integers(0, 256, self.total, dtype=np.uint8).data
        self.target[:] = self.source  # faulted in
        self.buffers = [self.source[at : at + length] for at in range(0, self.total, length)]
        self.room = [self.target[at : at + length] for at in range(0, self.total, length)]
        self.sums = [xxhash.xxh3_128_digest(buffer) for buffer in self.buffers]
        self.order = random.Random(1).sample(range(count), count)

    def fresh(self) -> list[tuple[Page, list[memoryview]]]:
        pages = (Page(bytes(16), os.urandom(32), bytes(32), self.length, (each,), 64) for each in self.sums)
        return [(page, [buffer]) for page, buffer in zip(pages, self.buffers, strict=True)]

    def rate(self, seconds: float) -> float:
        return self.total / 1e9 / seconds

    def check(self) -> None:
        assert self.target == self.source, "what was read is what was written"
        self.target[:: self.length] = bytes(self.count)


def main() -> None:
    wanted = options(__doc__, _add_options)
    table = Table(
        f"Shared tier, {PAGES} pages a file: GB/s, median (min..max)",
        ("pages", "case", "write", "read", "one by one", "write/copy", "read/raw"),
    )
    results: dict[str, Samples] = {}
    ratios: dict[str, float | None] = {}
    for size, length in SIZES.items():
        if wanted.quick and size == "8 MiB":
            continue
        progress(size)
        with scratch(wanted.rest.dir) as folder:
            pages = Pages(length)
            results[size] = _measure_folder(folder, pages, wanted)
        for name in CASES:
            _add_row(table, size, name, results[size], "copy, full" if "full" in name else "copy", "raw")
    one = results[KEY]
    for key, what, reference in (
        ("write_vs_copy", "write", "copy"), ("write_vs_raw", "write", "raw"), ("write_vs_pyarrow", "write", "pyarrow"),
        ("read_vs_raw", "read", "raw"), ("read_vs_copy", "read", "copy"), ("read_vs_pyarrow", "read", "pyarrow"),
    ):  # fmt: skip
        ratios[key] = one.ratio(f"kvd {what}", f"{reference} {what}")
    ratios["full_write_vs_copy"] = one.ratio("kvd, full write", "copy, full write")
    try:
        with moto() as uri:
            progress("S3")
            s3 = results["S3 1 MiB"] = _measure_bucket(uri, Pages(MIB, S3_PAGES), wanted)
        for name in ("kvd", "client"):
            _add_row(table, "S3 1 MiB", name, s3, "client", "client")
        ratios["s3_write_vs_client"] = s3.ratio("kvd write", "client write")
        ratios["s3_read_vs_client"] = s3.ratio("kvd read", "client read")
    except Missing as why:
        table.notes.append(f"S3 is missing: {why}")
    table.notes.append(
        "S3 rows: of the bare client. Reads of files come from the disk's host cache, not from its medium."
    )
    figures = {f"{size} {name}": round(of.median(name) or 0, 3) for size, of in results.items() for name in of.rounds}
    finish("shared", table, wanted, ratios, figures)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", type=Path, default=ROOT, help="the folder to write in: on the disk that is asked about"
    )


def _add_row(table: Table, size: str, name: str, samples: Samples, write_of: str, read_of: str) -> None:
    cells = [spread(samples.rounds.get(f"{name} {what}")) for what in ("write", "read", "one by one")]
    of = [samples.ratio(f"{name} write", f"{write_of} write"), samples.ratio(f"{name} read", f"{read_of} read")]
    table.add(size, name, *cells, *("missing" if ratio is None else f"{ratio:.2f}" for ratio in of))


def _measure_folder(folder: Path, pages: Pages, wanted: Options) -> Samples:
    quota, file_bytes = 4 * pages.total + 64 * MIB, 2 * pages.total
    with ExitStack() as stack:
        tidy = SharedTier(str(folder / "tidy"), "bench", quota, file_bytes, poll_s=0, grace_s=0)
        full = SharedTier(str(folder / "full"), "bench", quota, file_bytes, poll_s=1e9)
        for tier in (tidy, full):
            stack.callback(tier.close)
        for _ in range(5):
            full.put(pages.fresh())
        cases = [
            _tier("kvd", tidy, pages),
            _plain("copy", folder / "copy", pages, 0),
            _plain("raw", folder / "raw", pages, os.O_DIRECT),
            _pyarrow(folder / "pyarrow", pages),
            _tier("kvd, full", full, pages),
            _plain("copy, full", folder / "copy, full", pages, 0, full=True),
        ]
        return interleave(cases, wanted.rounds(5, 15))


def _tier(name: str, tier: SharedTier, pages: Pages) -> Run:
    def case(_: int) -> Mapping[str, float]:
        batch = pages.fresh()
        asked = [(batch[n][0].name, [pages.room[n]]) for n in pages.order]
        put_s, stored = timed(tier.put, batch)
        get_s, loaded = timed(tier.get, asked)
        pages.check()
        one_s, single = timed(lambda: [tier.get([one])[0] for one in asked])
        assert all([*stored, *loaded, *single]), tier.counters
        tier.remove([page.name for page, _ in batch])
        tier.tend()  # deletes what is dead, where the tier is not to wait until it is full
        return {
            f"{name} write": pages.rate(put_s),
            f"{name} read": pages.rate(get_s),
            f"{name} one by one": pages.rate(one_s),
        }

    return case


def _plain(name: str, path: Path, pages: Pages, flags: int, full: bool = False) -> Run:
    def write() -> None:
        if full:
            path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
        for at in range(0, pages.total, MIB):
            os.write(fd, pages.source[at : at + MIB])
        os.fsync(fd)
        os.close(fd)

    def read() -> None:
        fd = os.open(path, os.O_RDONLY | flags)
        for n in pages.order:
            os.preadv(fd, [pages.room[n]], n * pages.length)
        os.close(fd)

    def case(_: int) -> Mapping[str, float]:
        if not full:
            path.unlink(missing_ok=True)
        write_s, _done = timed(write)
        _out_of_cache(path)
        read_s, _done = timed(read)
        pages.check()
        return {f"{name} write": pages.rate(write_s), f"{name} read": pages.rate(read_s)}

    return case


def _pyarrow(path: Path, pages: Pages) -> Run:
    schema = pa.schema([("checksum", pa.binary(16)), ("payload", pa.large_binary())])
    ends = pa.py_buffer(np.array([0, pages.length], dtype=np.int64))

    def write() -> None:
        with pa.OSFile(str(path), "wb") as sink:
            with pa.ipc.new_file(sink, schema) as writer:
                for buffer, checksum in zip(pages.buffers, pages.sums, strict=True):
                    payload = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(buffer)])
                    writer.write_batch(pa.record_batch([pa.array([checksum], pa.binary(16)), payload], schema=schema))
            os.fsync(sink.fileno())

    def read() -> None:
        with pa.OSFile(str(path)) as source:
            file = pa.ipc.open_file(source)
            for n in pages.order:
                pages.room[n][:] = memoryview(file.get_batch(n)["payload"][0].as_buffer()).cast("B")

    def case(_: int) -> Mapping[str, float]:
        path.unlink(missing_ok=True)
        write_s, _done = timed(write)
        _out_of_cache(path)
        read_s, _done = timed(read)
        pages.check()
        return {"pyarrow write": pages.rate(write_s), "pyarrow read": pages.rate(read_s)}

    return case


def _out_of_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _measure_bucket(uri: str, pages: Pages, wanted: Options) -> Samples:
    tier = SharedTier(uri, "bench", 8 * pages.total, 2 * pages.total, poll_s=1e9)
    filesystem, root = fs.FileSystem.from_uri(uri)
    try:
        cases = [_tier("kvd", tier, pages), _client(filesystem, f"{root}/plain", pages)]
        return interleave(cases, wanted.rounds(3, 7))
    finally:
        tier.close()


def _client(filesystem: fs.FileSystem, path: str, pages: Pages) -> Run:
    def write() -> None:
        with filesystem.open_output_stream(path) as stream:
            stream.write(pages.source)

    def read() -> None:
        with filesystem.open_input_file(path) as source:
            for n in pages.order:
                pages.room[n][:] = source.read_at(pages.length, n * pages.length)

    def case(_: int) -> Mapping[str, float]:
        write_s, _done = timed(write)
        read_s, _done = timed(read)
        pages.check()
        return {"client write": pages.rate(write_s), "client read": pages.rate(read_s)}

    return case


@contextmanager
def moto() -> Iterator[str]:
    """The URI of an empty bucket. Raises Missing."""
    program = Path(sys.executable).with_name("moto_server")
    if not program.exists():
        raise Missing("no moto_server here: pip install 'moto[server]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=quiet, stderr=quiet)
    try:
        where = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        uri = f"s3://key:secret@kvd-bench/kv?{where}"
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if time.monotonic() > deadline:
                raise Missing("moto does not start")
            time.sleep(0.1)
        filesystem, root = fs.FileSystem.from_uri(uri)
        filesystem.create_dir(root.split("/")[0])
        yield uri
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
