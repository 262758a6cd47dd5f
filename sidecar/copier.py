"""Copies pages between a worker's memory and the arena, with their checksums, without holding the GIL.

The checksum (xxh3-128 of the page's bytes in order) is always taken over the worker's own memory: on the way in
from the source, on the way out from what has arrived. So whatever happens to the arena in between, by a stray
writer or a flipped bit, shows as a difference. Copies run in the calling thread and, for large batches, in helpers
that are waited for: when `store` or `load` returns, nobody touches the worker's memory any more.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import xxhash

from kvd.sidecar.pool import Bytes, PageSource

T = TypeVar("T")
CHECKSUM_BYTES = 16
_SHARE_BYTES = 8 << 20  # a helper is worth waking for this much
_SHARE_PAGE_BYTES = 512 << 10  # below, the threads wait for the GIL more than for memory


class Move(NamedTuple):
    """One page to copy: which page of the worker, and where in the arena."""

    page: int
    offset: int
    checksum: bytes = b""


class Hasher(Protocol):
    """A checksum in the making, such as xxhash's."""

    def update(self, data: Any, /) -> None: ...

    def digest(self) -> bytes: ...


class Unchecked:
    """No checksum at all: only the benchmark uses it, to show what checksums cost."""

    def update(self, data: Any, /) -> None: ...

    def digest(self) -> bytes:
        return bytes(CHECKSUM_BYTES)


class Copier:
    """`close` may be called twice."""

    def __init__(self, threads: int, hasher: Callable[[], Hasher] = xxhash.xxh3_128) -> None:
        self._threads = threads
        self._hasher = hasher
        self._pool = ThreadPoolExecutor(threads - 1, "kvd-copy") if threads > 1 else None

    def store(
        self, source: PageSource, arena: Bytes, length: int, moves: Sequence[Move], deadline: float,
        progress: Callable[[list[bytes]], None] | None = None,
    ) -> list[bytes]:  # fmt: skip
        """Worker -> arena. Checksums of the leading pages that were copied before the deadline.

        `progress` is called with those so far, in the calling thread, while the copying goes on.
        """

        hasher = self._hasher

        def one(move: Move) -> bytes:
            # Piece by piece: what the checksum has read is still in the cache when it is copied.
            running = hasher()
            at, end = move.offset, move.offset + length
            for piece in source.pieces(move.page):
                next_at = at + piece.nbytes
                if next_at > end:
                    return b""
                running.update(piece.data)
                np.copyto(arena[at:next_at], piece)
                at = next_at
            return running.digest() if at == end else b""

        return self._run(_Batch(moves, one), length, deadline, progress)

    def load(
        self, source: PageSource, arena: Bytes, length: int, moves: Sequence[Move], deadline: float
    ) -> list[bool]:
        """Arena -> worker. For the leading pages reached before the deadline: did the right bytes arrive?"""

        hasher = self._hasher

        def one(move: Move) -> bool:
            running = hasher()
            at, end = move.offset, move.offset + length
            for piece in source.pieces(move.page):
                next_at = at + piece.nbytes
                if next_at > end:
                    break
                np.copyto(piece, arena[at:next_at])
                running.update(piece.data)
                at = next_at
            if at != end:
                raise ValueError(f"the worker's page has not the {length} bytes of the stored one")
            return running.digest() == move.checksum

        return self._run(_Batch(moves, one), length, deadline)

    def _run(
        self, batch: "_Batch[T]", length: int, deadline: float, progress: Callable[[list[T]], None] | None = None
    ) -> list[T]:
        helpers: list[Future[None]] = []
        if self._pool is not None and length >= _SHARE_PAGE_BYTES and length * len(batch.moves) >= _SHARE_BYTES:
            helpers = [self._pool.submit(batch.work, deadline) for _ in range(self._threads - 1)]
        try:
            batch.work(deadline, progress)
        finally:
            # Even when our own part failed: the helpers' copies must end before the memory is given up.
            failures = [helper.exception() for helper in helpers]
        for failure in failures:
            if failure is not None:
                raise failure
        return batch.leading()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False)


class _Batch(Generic[T]):
    """Moves that several threads work off together: one that is held up takes fewer of them."""

    def __init__(self, moves: Sequence[Move], one: Callable[[Move], T]) -> None:
        self.moves = moves
        self._one = one
        self._done: list[T | None] = [None] * len(moves)
        self._positions = iter(range(len(moves)))  # shared by the threads: taking the next one is atomic
        self._leading = 0

    def work(self, deadline: float, progress: Callable[[list[T]], None] | None = None) -> None:
        """Take moves until none is left or the deadline has passed; after each, tell what is done in order so far."""
        for position in self._positions:
            if time.monotonic() >= deadline:
                break
            self._done[position] = self._one(self.moves[position])
            if progress is not None:
                progress(self.leading())

    def leading(self) -> list[T]:
        """Results up to the first move that is not done."""
        done = self._done
        while self._leading < len(done) and done[self._leading] is not None:
            self._leading += 1
        return done[: self._leading]  # type: ignore[return-value]  # no None among them
