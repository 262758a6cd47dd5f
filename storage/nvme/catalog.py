"""The catalog: which pages a folder of segments holds, and where. An LMDB environment; owns the record's format.

Database `pages`, key = name (48 bytes), value, little-endian:

    [slot u64][length u32][tokens u32][sequence u64][shards u16][kind u8][0 u8][stored u32][parent 32][seal u64]
    ([checksum 16])*

`slot` is segment << 20 | position. `sequence` grows from commit to commit. `kind` is what was known of the page's
worth (kvd.storage.worth), `stored` when it came, in seconds since 1970; the first kvd wrote 0 for both. The seal is
xxh3_64 over the name, what is before the seal and the checksums after it, for LMDB itself notices no flipped bit.
Database `meta`, key `format`:

    [magic 8][version u32][0 u32][uuid 16][segment_bytes u64]

Every commit is synchronous and all or nothing, so a crash leaves the records of the last commit or of the one before.
One thread writes at a time, any number read. What LMDB raises leaves this module as TierError, but a disk that fails
under its memory map kills the process with SIGBUS.
"""

import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, compress, islice, takewhile
from pathlib import Path
from typing import Final, NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash

from kvd.storage.failpoints import reach
from kvd.storage.tier import NAME_BYTES, Name, Page, TierError

MAGIC: Final = b"KVDNVME\0"
VERSION: Final = 1
META: Final = struct.Struct("<8sI4x16sQ")
_FIXED: Final = struct.Struct("<QIIQHBxI32s")
_SHARDS_AT: Final = 24
_SEAL: Final = struct.Struct("<Q")
CHECKSUM_BYTES: Final = 16
HEAD_BYTES: Final = _FIXED.size + _SEAL.size
HEAD: Final = np.dtype(
    [
        ("slot", "<u8"),
        ("length", "<u4"),
        ("tokens", "<u4"),
        ("sequence", "<u8"),
        ("shards", "<u2"),
        ("kind", "u1"),
        ("zero", "u1"),
        ("stored", "<u4"),
        ("rest", "V40"),
    ]
)
PIECE: Final = 1 << 16  # names per piece
HEADS: Final = 512  # records per piece of `heads`: they stay in the processor's cache, which halves the time

assert HEAD.itemsize == HEAD_BYTES == 72


class Record(NamedTuple):
    """Where a page is, and what it is."""

    slot: int
    sequence: int
    page: Page
    stored: int = 0  # seconds since 1970


class Heads(NamedTuple):
    """A piece of all records: names and fixed parts, not checked against their seals."""

    names: npt.NDArray[np.void]
    heads: npt.NDArray[np.void]
    odd: list[bytes]  # keys of what has not even the size of a record


def pack(record: Record) -> bytes:
    page = record.page
    fixed = _FIXED.pack(
        record.slot, page.length, page.tokens, record.sequence, page.shards, page.kind, record.stored, page.parent
    )
    checksums = b"".join(page.checksums)
    return fixed + _SEAL.pack(_seal(page.name, fixed, checksums)) + checksums


def unpack(name: Name, value: bytes) -> Record | None:
    """None: not what was written."""
    if len(value) <= HEAD_BYTES or (len(value) - HEAD_BYTES) % CHECKSUM_BYTES:
        return None
    fixed, checksums = value[: _FIXED.size], value[HEAD_BYTES:]
    slot, length, tokens, sequence, shards, kind, stored, parent = _FIXED.unpack(fixed)
    if _SEAL.unpack_from(value, _FIXED.size)[0] != _seal(name, fixed, checksums):
        return None
    sums = tuple(checksums[at : at + CHECKSUM_BYTES] for at in range(0, len(checksums), CHECKSUM_BYTES))
    assert len(sums) == shards, "a sealed record contradicts itself"
    return Record(slot, sequence, Page(name[:16], name[16:], parent, length, sums, tokens, kind), stored)


def _seal(name: Name, fixed: bytes, checksums: bytes) -> int:
    return xxhash.xxh3_64_intdigest(name + fixed + checksums)


class Catalog:
    """An open catalog."""

    def __init__(self, folder: Path, segment_bytes: int, map_bytes: int) -> None:
        """Opens or makes it. Raises TierError for one that this kvd must not touch."""
        with _translated("cannot open the catalog", f"remove {folder.parent} to start with an empty tier"):
            fresh = not (folder / "data.mdb").exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(str(folder), map_size=map_bytes, max_dbs=2, mode=0o600)
        try:
            with _translated("cannot open the catalog", f"remove {folder.parent} to start with an empty tier"):
                self._env.reader_check()
                self._pages = self._env.open_db(b"pages")
                self._meta = self._env.open_db(b"meta")
                self.uuid = self._recognise(folder.parent, segment_bytes)
            if fresh:
                for directory in (folder, folder.parent, folder.parent.parent):
                    _sync_directory(directory)
        except BaseException:
            self._env.close()
            raise

    def _recognise(self, folder: Path, segment_bytes: int) -> bytes:
        with self._env.begin() as reading:
            found = reading.get(b"format", db=self._meta)
        if found is None:
            own = uuid.uuid4().bytes
            reach("catalog.create.before_commit")
            with self._env.begin(write=True) as writing:
                writing.put(b"format", META.pack(MAGIC, VERSION, own, segment_bytes), db=self._meta)
            reach("catalog.create.after_commit")
            return own
        if len(found) < 12 or found[:8] != MAGIC:
            raise TierError(f"{folder} is not a folder of kvd", "point the tier at an empty folder")
        if (version := int.from_bytes(found[8:12], "little")) != VERSION or len(found) != META.size:
            hint = f"run the kvd that wrote it, or remove {folder} to start with an empty tier"
            raise TierError(f"{folder} has format {version}, this kvd knows {VERSION}", hint)
        _, _, own, made_with = META.unpack(found)
        if made_with != segment_bytes:
            hint = f"set segments to {made_with} bytes again, or remove {folder} to start with an empty tier"
            raise TierError(f"{folder} has segments of {made_with} bytes, not {segment_bytes}", hint)
        return bytes(own)

    # -- reading -------------------------------------------------------------------------------------------

    def values(self, names: Sequence[Name]) -> list[bytes | None]:
        """The records as they lie there, all of one moment."""
        with _translated("cannot read the catalog"), self._env.begin(db=self._pages) as reading:
            return [reading.get(name) if len(name) == NAME_BYTES else None for name in names]

    def names(self) -> Iterator[list[Name]]:
        """All names, in pieces; each piece is of a moment of its own."""
        after = b""
        while True:
            with _translated("cannot read the catalog"), self._env.begin(db=self._pages) as reading:
                cursor = reading.cursor()
                there = cursor.set_range(after)
                piece: list[Name] = list(islice(cursor.iternext(keys=True, values=False), PIECE)) if there else []
            if not piece:
                return
            yield piece
            after = piece[-1] + b"\0"

    def heads(self) -> Iterator[Heads]:
        """All records, once, for whoever opens the tier: 10**6 in less than a second."""
        with _translated("cannot read the catalog"), self._env.begin(db=self._pages) as reading:
            cursor = reading.cursor()
            flat = chain.from_iterable(cursor)  # name, value, name, value ... and nothing made in Python in between
            after = b""
            while rows := b"".join(islice(flat, 2 * HEADS)):
                last = cursor.key()
                yield _alike(rows) or _mixed(reading, after, last)
                after = last + b"\0"

    def __len__(self) -> int:
        with _translated("cannot read the catalog"), self._env.begin() as reading:
            return int(reading.stat(self._pages)["entries"])

    # -- writing -------------------------------------------------------------------------------------------

    def commit(self, insert: Iterable[Record] = (), delete: Iterable[Name] = ()) -> bool:
        """Delete, then insert, in one durable step. False: nothing was changed, for the disk is full."""
        with _translated("cannot write the catalog"):
            try:
                with self._env.begin(write=True, db=self._pages) as writing:
                    for name in delete:
                        writing.delete(name)
                    for record in insert:
                        writing.put(record.page.name, pack(record))
                    reach("catalog.commit.before")
                reach("catalog.commit.after")
            except (lmdb.MapFullError, lmdb.DiskError):  # DiskError is what py-lmdb calls ENOSPC, and only that
                with self._env.begin(write=True):  # raises when LMDB gave up its environment
                    return False
        return True

    def close(self) -> None:
        self._env.close()


def _alike(rows: bytes) -> Heads | None:
    """Names and values, one after the other, where all are records of as many shards; None: they are not."""
    shards = int.from_bytes(rows[NAME_BYTES + _SHARDS_AT :][:2], "little")
    size = NAME_BYTES + HEAD_BYTES + CHECKSUM_BYTES * shards
    if not shards or len(rows) % size:
        return None
    table = np.frombuffer(rows, np.uint8).reshape(-1, size)
    heads = np.ascontiguousarray(table[:, NAME_BYTES : NAME_BYTES + HEAD_BYTES]).view(HEAD).reshape(-1)
    if not (heads["shards"] == shards).all() or heads["zero"].any():
        return None
    return Heads(np.ascontiguousarray(table[:, :NAME_BYTES]).view(f"V{NAME_BYTES}").reshape(-1), heads, [])


def _mixed(reading: lmdb.Transaction, first: bytes, last: bytes) -> Heads:
    """The same of any records, from one key to another, b"" being the end."""
    cursor = reading.cursor()
    cursor.set_range(first)
    rest = ((bytes(name), bytes(value)) for name, value in cursor)
    records = list(takewhile(lambda record: not last or record[0] <= last, rest))
    fits = [len(name) == NAME_BYTES and len(value) >= HEAD_BYTES for name, value in records]
    names = b"".join(name for name, _ in compress(records, fits))
    heads = b"".join(value[:HEAD_BYTES] for _, value in compress(records, fits))
    odd = [name for (name, _), fit in zip(records, fits, strict=True) if not fit]
    return Heads(np.frombuffer(names, f"V{NAME_BYTES}"), np.frombuffer(heads, HEAD), odd)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(doing: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except (lmdb.Error, OSError) as why:
        raise TierError(f"{doing}: {why}", hint) from why
