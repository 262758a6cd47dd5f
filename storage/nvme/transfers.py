"""Payloads between memory and slots, several in flight, and whether they are what was put.

What the disk refuses is an answer here, not an exception. The calling thread works too, and when a call returns
nobody touches its buffers any more.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, TypeVar

import xxhash

from kvd.storage.failpoints import reach
from kvd.storage.nvme.catalog import Record
from kvd.storage.nvme.segments import Segments
from kvd.storage.nvme.sizeclass import POSITION_BITS
from kvd.storage.tier import Buffers, Page

T = TypeVar("T")

RUN_BYTES: Final = 8 << 20  # in one call. Of 1 MiB pages, a call at a time, it took 2.2 GB/s one by one, 2.8 so


class Transfers:
    """Threads that read and write segments."""

    def __init__(self, segments: Segments, threads: int) -> None:
        self._segments = segments
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "nvme")

    def write(self, payloads: Sequence[tuple[int, Buffers]]) -> set[int]:
        """Payloads into slots, and a barrier. Returns the slots whose payload is durable."""
        written: list[int] = []  # slots
        lost: list[int] = []  # segments

        def write(run: Sequence[tuple[int, Buffers]]) -> None:
            try:
                self._segments.write(run[0][0], [buffer for _, buffers in run for buffer in buffers])
                written.extend([slot for slot, _ in run])
            except OSError:
                if len(run) > 1:  # which of them it was
                    for payload in run:
                        write([payload])

        def sync(number: int) -> None:
            try:
                self._segments.sync(number)
            except OSError:
                lost.append(number)

        self._each(write, list(_runs(payloads)))
        reach("nvme.put.after_payload")
        self._each(sync, sorted({slot >> POSITION_BITS for slot, _ in payloads}))
        reach("nvme.put.after_barrier")
        return {slot for slot in written if slot >> POSITION_BITS not in lost}

    def read(self, wanted: Sequence[tuple[Record, Buffers]]) -> list[bool | None]:
        """Payloads out of their slots: True is right, False damaged, None for what the disk refused."""
        answers: list[bool | None] = [None] * len(wanted)

        def read(at: int) -> None:
            record, buffers = wanted[at]
            try:
                answers[at] = self._segments.read(record.slot, buffers) and _right(record.page, buffers)
            except OSError:
                answers[at] = None

        self._each(read, range(len(wanted)))
        return answers

    def close(self) -> None:
        self._pool.shutdown()

    def _each(self, do: Callable[[T], None], items: Sequence[T]) -> None:
        """`do` every item, several at a time: this thread and the pool's take one after the other."""
        queue = iter(items)  # the GIL makes `next` of it one step

        def work() -> None:
            for item in queue:
                do(item)

        helpers = [self._pool.submit(work) for _ in range(min(self._threads, len(items)) - 1)]
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()


def _runs(payloads: Sequence[tuple[int, Buffers]]) -> Iterator[list[tuple[int, Buffers]]]:
    """Neighbours in one segment together: one call keeps the disk busier than one for each page."""
    run: list[tuple[int, Buffers]] = []
    size = 0
    for payload in sorted(payloads, key=lambda payload: payload[0]):
        adds = sum(map(len, payload[1]))
        if run and (payload[0] != run[-1][0] + 1 or size + adds > RUN_BYTES):
            yield run
            run, size = [], 0
        run.append(payload)
        size += adds
    if run:
        yield run


def _right(page: Page, buffers: Buffers) -> bool:
    return all(
        xxhash.xxh3_128_digest(buffer[: page.length]) == checksum
        for buffer, checksum in zip(buffers, page.checksums, strict=True)
    )
