"""Segment files: the payloads of pages in slots of one size, on a disk that is asked directly.

`segment-00000.kvd`, `segment-00001.kvd` ... are segment_bytes long each and preallocated. Little-endian:

    header   4096   [magic 8][version u32][number u32][uuid 16][slot_bytes u64][slots u32][0 u32][seal u64]   rest 0
    slots    slot_bytes x slots; a page's shards one after the other, each from a multiple of 4096

The uuid is the catalog's and the seal xxh3_64 over what is before it: a file that was swapped, truncated, zeroed or
brought from elsewhere is not recognised, and what the catalog says of it is void. A crash leaves a slot in any state;
whether it holds a page is for the catalog to say, and whether it holds the right bytes for their checksum.

Reads and writes go with O_DIRECT between the disk and the caller's memory where memory and file system allow it, else
through a buffer; they release the GIL, so threads keep several in flight.

Not io_uring: with raw system calls from Python it was as fast as threads, pages of 1 MiB, GB/s and CPU seconds per GB,
medians of 8 rounds (virtio disk, Linux 6.18, busy machine), reads with their checksum:

    in flight           1                     4                     16
    write    threads    2.11  0.113           2.47  0.082           2.49  0.103
             io_uring   1.85  0.107           2.35  0.086           2.44  0.080
    read     threads    0.89  0.182           1.14  0.160           1.14  0.172
             io_uring   0.91  0.204           1.16  0.159           1.20  0.155

and the one kept binding that installs from PyPI (liburing 2026.3) takes bytes and bytearrays only, which O_DIRECT
cannot use and the arena is not, and holds the GIL while it waits.
"""

import errno
import mmap
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from kvd.storage.failpoints import reach
from kvd.storage.nvme.sizeclass import POSITION_BITS
from kvd.storage.tier import Buffers, Page, TierError

MAGIC: Final = b"KVDSEGMT"
VERSION: Final = 1
ALIGN: Final = 4096
HEADER: Final = struct.Struct("<8sII16sQI4x")
_SEAL: Final = struct.Struct("<Q")
_POSITION: Final = (1 << POSITION_BITS) - 1
_VECTORS: Final = 1024  # IOV_MAX


def aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def slot_bytes_of(page: Page) -> int:
    return page.shards * aligned(page.length)


def fits(page: Page, buffers: Buffers) -> bool:
    """The page can be stored, and these are buffers for it."""
    if not 0 < page.length < 1 << 32 or not 0 < page.shards == len(buffers) < 1 << 16:
        return False
    return all(len(buffer) == aligned(page.length) for buffer in buffers)


class Segments:
    """The open segment files of a folder. OSError from any method is the disk's own."""

    def __init__(self, folder: Path, segment_bytes: int, catalog: bytes) -> None:
        self._folder, self._bytes, self._catalog = folder, segment_bytes, catalog
        self._files: dict[int, int] = {}
        self._slot_bytes: dict[int, int] = {}
        self._direct = True

    # -- files ---------------------------------------------------------------------------------------------

    def open(self, limit: int) -> dict[int, int]:
        """Open the files below `limit`, forget those beyond it. Returns number -> slot_bytes of the recognised."""
        _allow_descriptors(limit + 256)
        for path in sorted(self._folder.glob("segment-*.kvd")):
            with suppress(ValueError):
                number = int(path.stem.removeprefix("segment-"))
                if number < limit and path == self._path(number):
                    self._recognise(number)
        return dict(self._slot_bytes)

    def drop_beyond(self, limit: int) -> None:
        """Remove the files from `limit` on. The catalog must know nothing of them any more."""
        for path in self._folder.glob("segment-*.kvd"):
            with suppress(ValueError, FileNotFoundError):
                if int(path.stem.removeprefix("segment-")) >= limit:
                    path.unlink()

    def _recognise(self, number: int) -> None:
        descriptor = self._open(self._path(number), 0)
        page = memoryview(mmap.mmap(-1, ALIGN))
        try:
            whole = os.fstat(descriptor).st_size == self._bytes and os.preadv(descriptor, [page], 0) == ALIGN
        except OSError:
            whole = False
        if not whole:
            os.close(descriptor)
            return
        magic, version, own, catalog, slot_bytes, slots = HEADER.unpack_from(page)
        sealed = _SEAL.unpack_from(page, HEADER.size)[0] == xxhash.xxh3_64_intdigest(page[: HEADER.size])
        known = (magic, version, own, catalog) == (MAGIC, VERSION, number, self._catalog)
        if sealed and known and slot_bytes and slots == self.slots_of(slot_bytes):
            self._files[number], self._slot_bytes[number] = descriptor, slot_bytes
        else:
            os.close(descriptor)

    def create(self, number: int, slot_bytes: int) -> None:
        """Make segment `number`, or make it anew. Durable when it returns; OSError leaves none (ENOSPC: no room)."""
        path = self._path(number)
        reach("segments.create.before")
        descriptor = self._open(path, os.O_CREAT)
        try:
            reach("segments.create.after_open")
            os.ftruncate(descriptor, self._bytes)
            os.posix_fallocate(descriptor, 0, self._bytes)
            reach("segments.create.after_allocate")
            self._files[number] = descriptor
            self.assign(number, slot_bytes)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            reach("segments.create.after_sync")
        except OSError:
            os.close(descriptor)
            self._files.pop(number, None)
            with suppress(OSError):
                path.unlink()
            raise

    def assign(self, number: int, slot_bytes: int) -> None:
        """Give a segment, of which the catalog knows no page, to a size class. Durable when it returns."""
        page = memoryview(mmap.mmap(-1, ALIGN))
        slots = self.slots_of(slot_bytes)
        HEADER.pack_into(page, 0, MAGIC, VERSION, number, self._catalog, slot_bytes, slots)
        _SEAL.pack_into(page, HEADER.size, xxhash.xxh3_64_intdigest(page[: HEADER.size]))
        reach("segments.assign.before_header")
        if os.pwritev(self._files[number], [page], 0) != ALIGN:
            raise OSError(errno.EIO, "short write")
        reach("segments.assign.after_header")
        os.fdatasync(self._files[number])
        reach("segments.assign.after_sync")
        self._slot_bytes[number] = slot_bytes

    def slots_of(self, slot_bytes: int) -> int:
        """How many such slots a segment has; 0: they are too large."""
        return min((self._bytes - ALIGN) // slot_bytes, _POSITION + 1)

    def __contains__(self, number: int) -> bool:
        return number in self._files

    def __len__(self) -> int:
        return len(self._files)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _path(self, number: int) -> Path:
        return self._folder / f"segment-{number:05d}.kvd"

    def _open(self, path: Path, flags: int) -> int:
        if self._direct:
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT | flags, 0o600)
            except OSError as why:
                if why.errno != errno.EINVAL:
                    raise
                self._direct = False  # this file system has none
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)

    # -- payloads ------------------------------------------------------------------------------------------

    def write(self, slot: int, buffers: Buffers) -> None:
        """All shards of a page, or of the pages of neighbouring slots, from a slot on; durable after `sync`."""
        reach("segments.write")
        with _straight(buffers, fill=True) as vectors:
            descriptor, offset = self._place(slot)
            for part in _parts(vectors):
                size = sum(len(vector) for vector in part)
                if os.pwritev(descriptor, part, offset) != size:
                    raise OSError(errno.EIO, "short write")
                offset += size

    def read(self, slot: int, buffers: Buffers) -> bool:
        """All shards of a page out of its slot. False: the file ends before."""
        reach("segments.read")
        with _straight(buffers, fill=False) as vectors:
            descriptor, offset = self._place(slot)
            for part in _parts(vectors):
                size = sum(len(vector) for vector in part)
                if os.preadv(descriptor, part, offset) != size:
                    return False
                offset += size
        return True

    def sync(self, number: int) -> None:
        """What was written to this segment survives power loss when this returns."""
        reach("segments.sync")
        os.fdatasync(self._files[number])

    def _place(self, slot: int) -> tuple[int, int]:
        number = slot >> POSITION_BITS
        return self._files[number], ALIGN + (slot & _POSITION) * self._slot_bytes[number]


def _parts(vectors: list[memoryview]) -> Iterator[list[memoryview]]:
    for at in range(0, len(vectors), _VECTORS):
        yield vectors[at : at + _VECTORS]


@contextmanager
def _straight(buffers: Buffers, fill: bool) -> Iterator[list[memoryview]]:
    """The buffers where the disk can reach them, or copies of them: filled before, or copied back after."""
    straight = list(buffers)
    copied: list[tuple[memoryview, memoryview]] = []
    for at, buffer in enumerate(buffers):
        if _address(buffer) % ALIGN:
            straight[at] = memoryview(mmap.mmap(-1, len(buffer)))
            copied.append((buffer, straight[at]))
            if fill:
                straight[at][:] = buffer
    yield straight
    if not fill:
        for buffer, copy in copied:
            buffer[:] = copy


def _address(buffer: memoryview) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _allow_descriptors(count: int) -> None:
    """One open file per segment; what the process may have open by default is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    elif hard < count:
        raise TierError(f"{count} segments need as many open files, {hard} are allowed", "use larger segments")
