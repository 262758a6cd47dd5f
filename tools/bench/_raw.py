"""A disk written and read by threads with pwritev and preadv, O_DIRECT, from and to memory as the arena is."""

import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.bench._table import Run

ALIGN = 4096


def shared_buffers(count: int, size: int) -> list[memoryview]:
    """Memory of a memfd, as the arena is: a disk may take and give it faster than a process's own."""
    descriptor = os.memfd_create("kvd-bench")
    os.ftruncate(descriptor, count * size)
    memory = memoryview(mmap.mmap(descriptor, count * size))
    os.close(descriptor)
    return [memory[n * size : (n + 1) * size] for n in range(count)]


class RawFile:
    """Writes to a file of slots of one size, written once before the first round; reads of any files. A context."""

    def __init__(self, path: Path, size_bytes: int, page_bytes: int, batch_bytes: int) -> None:
        self._path, self._page_bytes = path, page_bytes
        self._slot = -(-page_bytes // ALIGN) * ALIGN
        self._slots, self._batch = size_bytes // self._slot, batch_bytes // page_bytes
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._file, 0, self._slots * self._slot)
        buffers = shared_buffers(2 * self._batch, self._slot)
        self._sources, self._targets = buffers[: self._batch], buffers[self._batch :]
        rng = random.Random(page_bytes)
        for buffer in buffers:
            buffer[:] = rng.randbytes(self._slot)
        self._at = 0
        self._write(4, self._slots)

    def __enter__(self) -> "RawFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self._path.unlink()

    def case(self, depth: int, pages: int, files: Sequence[Path], offset: int) -> Run:
        """Writes, and random reads of `files` from `offset` on in each, of `pages` pages, `depth` in flight."""
        total = pages * self._page_bytes / 1e9
        per = (files[0].stat().st_size - offset) // self._slot
        places = [(file, offset + at * self._slot) for file in files for at in range(per)]

        def case(_: int) -> Mapping[str, float]:
            figures: dict[str, float] = {}
            opened = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files}
            asked = [(opened[file], at) for file, at in random.sample(places, pages)]
            for what, work in (
                ("write", lambda: self._write(depth, pages)),
                ("read", lambda: self._read(depth, asked)),
            ):
                cpu, started = time.process_time(), time.perf_counter()
                work()
                figures[f"raw qd{depth} {what}"] = total / (time.perf_counter() - started)
                figures[f"raw qd{depth} {what} cpu"] = (time.process_time() - cpu) / total
            for descriptor in opened.values():
                os.close(descriptor)
            return figures

        return case

    def _write(self, depth: int, pages: int) -> None:
        """In order and round the file, a barrier after each batch."""
        for first in range(0, pages, self._batch):
            at = self._at

            def write(number: int, at: int = at) -> None:
                offset = (at + number) % self._slots * self._slot
                assert os.pwritev(self._file, [self._sources[number]], offset) == self._slot

            _each(write, min(self._batch, pages - first), depth)
            os.fdatasync(self._file)
            self._at += self._batch

    def _read(self, depth: int, asked: Sequence[tuple[int, int]]) -> None:
        def read(number: int) -> None:
            assert os.preadv(asked[number][0], [self._targets[number % self._batch]], asked[number][1]) == self._slot

        _each(read, len(asked), depth)


def _each(do: Callable[[int], None], count: int, depth: int) -> None:
    numbers = iter(range(count))

    def work() -> None:
        for number in numbers:
            do(number)

    threads = [threading.Thread(target=work) for _ in range(depth - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
