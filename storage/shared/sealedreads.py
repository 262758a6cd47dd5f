"""Reading sealed files in a depot: an index by the file's end, payloads in several reads at once.

Raises nothing about a single page: each gets one word. "good" is the only one with the page in the buffers.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import xxhash

from kvd.storage.shared.depot import Depot, Entry, Piece, ShortRead
from kvd.storage.shared.sealed import Index, Row, TailTooShort, Unreadable, read_index
from kvd.storage.tier import Buffers

GOOD: Final = "good"
ABSENT: Final = "absent"  # the whole file is
DAMAGED: Final = "damaged"
UNREADABLE: Final = "unreadable"  # now; perhaps not the next time
_TAIL: Final = 64 << 10  # the index of some 400 pages
_MOST_TAIL: Final = 256 << 20


class Wish(NamedTuple):
    """A page to be read from where it is. The number is the asker's."""

    number: int
    row: Row
    buffers: Buffers


def index_of(depot: Depot, entry: Entry, stamp: int) -> Index:
    """The index of a file made at that stamp. Raises Unreadable, or OSError."""
    length = min(_TAIL, entry.size)
    while True:
        try:
            return read_index(depot.read_bytes(entry.path, entry.size - length, length), entry.size, stamp)
        except TailTooShort as more:
            if not length < more.needed <= min(entry.size, _MOST_TAIL):
                raise Unreadable("damaged") from None
            length = more.needed
        except ShortRead:
            raise Unreadable("truncated") from None


def read_pages(
    depot: Depot, pool: ThreadPoolExecutor, files: dict[str, list[Wish]]
) -> Iterator[tuple[str, Wish, str]]:
    """Fill the buffers; yields (path, wish, what came of it)."""
    tasks = [(path, share) for path, wishes in files.items() for share in _shares(wishes, depot.parallel)]
    outcomes = (pool.map if len(tasks) > 1 else map)(lambda task: _read(depot, *task), tasks)
    for (path, share), words in zip(tasks, outcomes, strict=True):
        yield from ((path, wish, word) for wish, word in zip(share, words, strict=True))


def _read(depot: Depot, path: str, wishes: Sequence[Wish]) -> list[str]:
    try:
        depot.read(path, [Piece(row.offset, buffers, row.page.length) for _, row, buffers in wishes])
    except FileNotFoundError:
        return [ABSENT] * len(wishes)
    except OSError as error:
        if len(wishes) > 1:  # which of them is it?
            return [_read(depot, path, [wish])[0] for wish in wishes]
        return [DAMAGED if isinstance(error, ShortRead) else UNREADABLE]
    return [GOOD if _is_right(wish) else DAMAGED for wish in wishes]


def _is_right(wish: Wish) -> bool:
    page = wish.row.page
    return page.checksums == tuple(xxhash.xxh3_128_digest(buffer[: page.length]) for buffer in wish.buffers)


def _shares(wishes: list[Wish], parallel: int) -> list[list[Wish]]:
    """Neighbours together, in the file's order."""
    wishes.sort(key=lambda wish: wish.row.offset)
    each = -(-len(wishes) // parallel)
    return [wishes[at : at + each] for at in range(0, len(wishes), each)]
