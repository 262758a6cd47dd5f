"""A sealed file: pages as an Arrow IPC file that any Arrow reader opens, and an index that finds one page in one read.

Little-endian. Everything begins at a multiple of 4096 up to the last payload, so that payloads move between file and
arena without a copy; the gaps are zeros.

    "ARROW1\\0\\0"  schema message
    n x ( gap | record batch: header, small columns | payload of shard 0, 1, ... )     the payload begins at 4096 x k
    end of stream, 8 bytes
    index    n x [namespace 16][key 32][parent 32][length u64][offset u64][stamp u64]
                 [tokens u32][first u32][shards u16][0 6]
             checksums, 16 bytes each: a row's are `shards` from `first`
    ending   [magic 8][version u32][n u32][checksums u32][0 u32][xxh3_128 16 of all from the index to here]
    footer   Arrow's, with "ARROW1" at the end of the file

A batch is one row: namespace, key, parent, length, tokens, stamp, checksums (xxh3-128 a shard), payload (all shards
joined). The schema's metadata: "kvd.version", "kvd.node"; "kvd.tenant" where the pages count against one tenant's
share; "kvd.namespaces" in an exported file (`lonefile`). The index repeats the small columns, for whoever lists
thousands of files. A stamp names the put that brought a page; it stays when a page moves to another file, and says its
age (`stamps`). Files are written once and published whole. What a copy of a file that was cut short or flipped can do
to a reader: no ending, no seal, or a payload that differs from its checksums; each is a miss. No checksum covers the
footer: a flip there may count a file against another tenant or none.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import xxhash

from kvd.storage.shared.arrowfooter import Block, footer, metadata
from kvd.storage.tier import Buffers, Name, Page

VERSION: Final = 1
ALIGN: Final = 4096
MAX_ROWS: Final = 1 << 20
_MAGIC: Final = b"KVDINDEX"
_ROW: Final = struct.Struct("<16s32s32sQQQIIH6x")
_ROW_STAMP: Final = struct.Struct("<48s48xQ")  # a row's name and stamp
_ENDING: Final = struct.Struct("<8sIIII16s")
_SMALL: Final = struct.Struct("<16s32s32sQQQ")  # a batch's columns before the checksums, as Arrow lays them out
_FRONT: Final = b"ARROW1\0\0"
_END_OF_STREAM: Final = b"\xff\xff\xff\xff\0\0\0\0"
_SUM_BYTES: Final = 16
_TENANT: Final = "kvd.tenant"

assert _ROW.size == 120


class Unreadable(Exception):
    """Not a sealed file that we can read; `reason` is one word to count it under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TailTooShort(Exception):
    """The index is longer than what was read of the file's end."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class Row(NamedTuple):
    page: Page
    offset: int  # of the payload in its file
    stamp: int


class Rows:
    """A file's index as it lies in the file: 10**6 pages are 136 MB, not 10**7 objects."""

    def __init__(self, rows: bytes, checksums: bytes) -> None:
        self._rows = rows
        self._checksums = checksums

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size

    def __getitem__(self, number: int) -> Row:
        fields = _ROW.unpack_from(self._rows, number * _ROW.size)
        namespace, key, parent, length, offset, stamp, tokens, first, shards = fields
        sums = self._checksums[first * _SUM_BYTES : (first + shards) * _SUM_BYTES]
        each = tuple(sums[at : at + _SUM_BYTES] for at in range(0, len(sums), _SUM_BYTES))
        return Row(Page(namespace, key, parent, length, each, tokens), offset, stamp)

    def payload_bytes(self, number: int) -> int:
        """Of all shards together."""
        fields = _ROW.unpack_from(self._rows, number * _ROW.size)
        return int(fields[3] * fields[8])

    def stamps(self) -> Iterator[tuple[Name, int]]:
        """Name and stamp of every row, in order."""
        at = range(0, len(self._rows), _ROW.size)
        return (_ROW_STAMP.unpack_from(self._rows, offset) for offset in at)

    def check(self, size: int, newest: int) -> None:
        """Raises Unreadable unless every row lies in a file of this size and is no younger than the file."""
        checksums = len(self._checksums) // _SUM_BYTES
        for fields in _ROW.iter_unpack(self._rows):
            length, offset, stamp, _, first, shards = fields[3:]
            if not (length and shards and first + shards <= checksums and offset + length * shards <= size):
                raise Unreadable("damaged")
            if stamp > newest:
                raise Unreadable("damaged")


class Index(NamedTuple):
    """What a file's end says of it."""

    rows: Rows
    tenant: str  # whose share its pages count against; "" for nobody's


class Sheet(NamedTuple):
    """A file ready to be written: its parts in order, cut off at `size`.

    `direct`: all parts begin at, and have, multiples of 4096 bytes, so that they can bypass the page cache.
    """

    parts: list[memoryview]
    size: int
    rows: Rows
    direct: bool


@lru_cache
def schema(node: str, namespaces: str = "", tenant: str = "") -> pa.Schema:
    """`namespaces`: what an exported file says of them, see `lonefile`; files of a tier say nothing.

    `tenant`: whose share the pages count against; nothing is said where that is nobody's.
    """
    fields = [
        ("namespace", pa.binary(16)),
        ("key", pa.binary(32)),
        ("parent", pa.binary(32)),
        ("length", pa.uint64()),
        ("tokens", pa.uint64()),
        ("stamp", pa.uint64()),
        ("checksums", pa.list_(pa.binary(_SUM_BYTES))),
        ("payload", pa.large_binary()),
    ]
    about = {"kvd.version": str(VERSION), "kvd.node": node}
    about |= {key: said for key, said in (("kvd.namespaces", namespaces), (_TENANT, tenant)) if said}
    return pa.schema([pa.field(*field, nullable=False) for field in fields], metadata=about)


def fits(page: Page, buffers: Buffers) -> bool:
    """Whether a page can be moved from or to these buffers."""
    size = _up(page.length, ALIGN)
    return page.length > 0 and 0 < page.shards == len(buffers) and all(len(buffer) == size for buffer in buffers)


def lay_out(
    pages: Sequence[tuple[Page, Buffers]], stamps: Sequence[int], node: str, namespaces: str = "", tenant: str = ""
) -> Sheet:
    """A file of these pages. Its parts are views of the buffers, which must not change until it is written."""
    assert 0 < len(pages) <= MAX_ROWS, "a file has pages"
    message = bytes(schema(node, namespaces, tenant).serialize())
    front = _FRONT + message
    leads = [_lead(page, stamp) for (page, _), stamp in zip(pages, stamps, strict=True)]
    rooms = [_up(len(lead), ALIGN) for lead in leads]
    start = _up(len(front), ALIGN)
    memory = memoryview(mmap.mmap(-1, start + sum(rooms)))  # a mapping begins at a multiple of 4096
    memory[: len(front)] = front
    parts, blocks, rows, checksums = [memory[:start]], list[Block](), list[bytes](), list[bytes]()
    at, used, direct = start, start, True
    for (page, buffers), stamp, lead, room in zip(pages, stamps, leads, rooms, strict=True):
        memory[used + room - len(lead) : used + room] = lead
        parts.append(memory[used : used + room])
        used += room
        payload = page.length * page.shards
        header = len(_header(page.length, page.shards))
        blocks.append((at + room - len(lead), header, len(lead) - header + _up(payload, 8)))
        at += room
        fields = (page.length, at, stamp, page.tokens, len(checksums), page.shards)
        rows.append(_ROW.pack(page.namespace, page.key, page.parent, *fields))
        checksums += page.checksums
        parts += [buffer[: page.length] for buffer in buffers]
        if gap := -payload % ALIGN:
            parts.append(memoryview(bytes(gap)))
        direct = direct and page.length % ALIGN == 0
        at += _up(payload, ALIGN)
    index = Rows(b"".join(rows), b"".join(checksums))
    tail = _END_OF_STREAM + _sealed(index)
    tail += footer(message, blocks)
    end = memoryview(mmap.mmap(-1, _up(len(tail), ALIGN)))
    end[: len(tail)] = tail
    return Sheet([*parts, end], at + len(tail), index, direct)


def read_index(tail: bytes, size: int, newest: int) -> Index:
    """The index of a file of `size` bytes that ends with `tail`. Raises Unreadable; TailTooShort: come again."""
    if size < ALIGN or len(tail) < 10 or tail[-6:] != b"ARROW1":
        raise Unreadable("truncated")
    (length,) = struct.unpack_from("<i", tail, len(tail) - 10)
    end = len(tail) - 10 - length
    if length < 0 or size - 10 - length < ALIGN:
        raise Unreadable("damaged")
    if end < _ENDING.size:
        raise TailTooShort(10 + length + _ENDING.size)
    magic, version, count, checksums, _, seal = _ENDING.unpack_from(tail, end - _ENDING.size)
    if magic != _MAGIC:
        raise Unreadable("foreign")
    if version != VERSION:
        raise Unreadable("version")
    index_bytes = count * _ROW.size + checksums * _SUM_BYTES
    start = end - _ENDING.size - index_bytes
    if count > MAX_ROWS or index_bytes > size:
        raise Unreadable("damaged")
    if start < 0:
        raise TailTooShort(len(tail) - start)
    if xxhash.xxh3_128_digest(tail[start : end - _SUM_BYTES]) != seal:
        raise Unreadable("damaged")
    middle = start + count * _ROW.size
    rows = Rows(tail[start:middle], tail[middle : middle + checksums * _SUM_BYTES])
    rows.check(size, newest)
    return Index(rows, metadata(tail[end:-10]).get(_TENANT.encode(), b"").decode(errors="replace"))


def _sealed(index: Rows) -> bytes:
    body = index._rows + index._checksums
    count = len(index._checksums) // _SUM_BYTES
    ending = _ENDING.pack(_MAGIC, VERSION, len(index), count, 0, b"")[:-_SUM_BYTES]
    return body + ending + xxhash.xxh3_128_digest(body + ending)


def _lead(page: Page, stamp: int) -> bytes:
    """What stands right before a payload: the batch's header and all columns but the payload's bytes."""
    payload = page.length * page.shards
    small = _SMALL.pack(page.namespace, page.key, page.parent, page.length, page.tokens, stamp)
    offsets = struct.pack("<ii", 0, page.shards), b"".join(page.checksums), struct.pack("<qq", 0, payload)
    return b"".join((_header(page.length, page.shards), small, *offsets))


@lru_cache(256)
def _header(length: int, shards: int) -> bytes:
    """The header of a batch, as pyarrow writes it: the same for all pages of these sizes."""
    empty = memoryview(mmap.mmap(-1, length * shards))
    small = [[bytes(16)], [bytes(32)], [bytes(32)], [0], [0], [0], [[bytes(_SUM_BYTES)] * shards]]
    fields = schema("")
    arrays = [pa.array(value, field.type) for value, field in zip(small, fields, strict=False)]
    ends = pa.py_buffer(struct.pack("<qq", 0, len(empty)))
    arrays.append(pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(empty)]))
    message = memoryview(pa.record_batch(arrays, schema=fields).serialize())
    (framed,) = struct.unpack_from("<I", message, 4)
    body = len(message) - 8 - framed
    expected = _SMALL.size + 8 + _SUM_BYTES * shards + 16 + _up(len(empty), 8)
    assert body == expected, f"pyarrow {pa.__version__} lays a batch out in another way: {body}, not {expected}"
    return bytes(message[: 8 + framed])


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
