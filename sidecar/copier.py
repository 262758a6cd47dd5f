"""Copies pages between a worker's memory and the arena, with their checksums, without holding the GIL.

The checksum (xxh3-128 of the page's bytes in order) is always taken over the worker's own memory: on the way in
from the source, on the way out from what has arrived. So whatever happens to the arena in between, by a stray
writer or a flipped bit, shows as a difference. Copies run in the calling thread and, for large batches, in helpers
that are waited for: when `store` or `load` returns, nobody touches the worker's memory any more.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

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


def digest(pieces: Sequence[Bytes]) -> bytes:
    """Checksum of a page."""
    if len(pieces) == 1:
        return xxhash.xxh3_128_digest(pieces[0].data)
    running = xxhash.xxh3_128()
    for piece in pieces:
        running.update(piece.data)
    return running.digest()


def unchecked(pieces: Sequence[Bytes]) -> bytes:
    """No checksum at all: only the benchmark uses it, to show what checksums cost."""
    return bytes(CHECKSUM_BYTES)


class Copier:
    """`close` may be called twice."""

    def __init__(self, threads: int, digest: Callable[[Sequence[Bytes]], bytes] = digest) -> None:
        self._threads = threads
        self._digest = digest
        self._pool = ThreadPoolExecutor(threads - 1, "kvd-copy") if threads > 1 else None

    def store(
        self, source: PageSource, arena: Bytes, length: int, moves: Sequence[Move], deadline: float
    ) -> list[bytes]:
        """Worker -> arena. Checksums of the leading pages that were copied before the deadline."""

        def one(move: Move) -> bytes:
            pieces = source.pieces(move.page)
            if sum(piece.nbytes for piece in pieces) != length:
                return b""
            checksum = self._digest(pieces)
            _copy_in(pieces, arena[move.offset : move.offset + length])
            return checksum

        return self._run(one, moves, length, deadline)

    def load(
        self, source: PageSource, arena: Bytes, length: int, moves: Sequence[Move], deadline: float
    ) -> list[bool]:
        """Arena -> worker. For the leading pages reached before the deadline: did the right bytes arrive?"""

        def one(move: Move) -> bool:
            pieces = source.pieces(move.page)
            if sum(piece.nbytes for piece in pieces) != length:
                raise ValueError(f"the worker's page has not the {length} bytes of the stored one")
            _copy_out(arena[move.offset : move.offset + length], pieces)
            return self._digest(pieces) == move.checksum

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


def _copy_in(pieces: Sequence[Bytes], slot: Bytes) -> None:
    at = 0
    for piece in pieces:
        np.copyto(slot[at : at + piece.nbytes], piece)
        at += piece.nbytes


def _copy_out(slot: Bytes, pieces: Sequence[Bytes]) -> None:
    at = 0
    for piece in pieces:
        np.copyto(piece, slot[at : at + piece.nbytes])
        at += piece.nbytes
