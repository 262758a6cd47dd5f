"""Copies pages between a worker's memory and the arena, with their checksums, without holding the GIL.

The checksum (xxh3-128 of the page's bytes in order) is always taken over the worker's own memory: on the way in
from the source, on the way out from what has arrived. So whatever happens to the arena in between, by a stray
writer or a flipped bit, shows as a difference. Copies run in the calling thread and, for large batches, in helpers
that are waited for: when `store` or `load` returns, nobody touches the worker's memory any more.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

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
        self, source: PageSource, arena: Bytes, length: int, moves: Sequence[Move], deadline: float
    ) -> list[bytes]:
        """Worker -> arena. Checksums of the leading pages that were copied before the deadline."""

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

        return self._run(one, moves, length, deadline)

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

        return self._run(one, moves, length, deadline)

    def _run(self, one: Callable[[Move], T], moves: Sequence[Move], length: int, deadline: float) -> list[T]:
        def part(mine: Sequence[Move]) -> list[T]:
            done: list[T] = []
            for move in mine:
                if time.monotonic() >= deadline:
                    break
                done.append(one(move))
            return done

        pool = self._pool
        if pool is None or length < _SHARE_PAGE_BYTES or length * len(moves) < _SHARE_BYTES:
            return part(moves)
        share = -(-len(moves) // self._threads)
        others = [pool.submit(part, moves[at : at + share]) for at in range(share, len(moves), share)]
        try:
            done = part(moves[:share])
        finally:
            # Even when our own part failed: the helpers' copies must end before the memory is given up.
            rest = [(future.exception(), future) for future in others]
        whole = len(done) == min(share, len(moves))
        for failure, future in rest:
            if failure is not None:
                raise failure
            if whole:
                mine = future.result()
                done += mine
                whole = len(mine) == share
        return done

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False)
