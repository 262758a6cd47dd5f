"""One sealed file by itself, outside a shared tier: what `kvdctl export` writes and `kvdctl import` reads.

Exactly a shared tier's file (`sealed`), whose schema metadata also says what the namespaces are: "kvd.namespaces",
JSON, a list of {namespace, page_bytes, page_tokens, shards, pool, label, family}, bytes as hex. A file without it is
as good; it leaves out what pools are called. A file is written under a temporary name, page by page, and renamed when
it is whole and synced. What is read is compared with its checksums. Raises KvdError: which file, and what to do.
"""

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import pyarrow as pa  # type: ignore[import-untyped]

from kvd.errors import UNDECODABLE, KvdError
from kvd.pages import NAMESPACE_BYTES
from kvd.storage.shared.depot import TEMPORARY, Entry
from kvd.storage.shared.folder import Folder
from kvd.storage.shared.sealed import ALIGN, MAX_ROWS, Unreadable, lay_out
from kvd.storage.shared.sealedreads import GOOD, UNREADABLE, Wish, index_of, read_pages
from kvd.storage.shared.stamps import at
from kvd.storage.tier import Page
from kvd.wire import NamespaceSpec

NAMESPACES: Final = b"kvd.namespaces"
_NEWEST: Final = (1 << 64) - 1  # whoever wrote it may have had a clock that is ahead
_THREADS: Final = 2
_WRONG: Final = {
    "truncated": ("is cut short", "copy it again, or export it again"),
    "damaged": ("is damaged", "copy it again, or export it again"),
    "foreign": ("is an Arrow file, but not one of kvd's pages", "give files of kvdctl export or *.pages.arrow"),
    "version": ("has another version of the format", "export it with the version of kvd that runs here"),
}


class SealedWriter:
    """The file appears at `path` with `publish`; without it `close` leaves nothing. `close` may be called twice."""

    def __init__(self, path: Path, pages: Sequence[Page], specs: Sequence[NamespaceSpec], node: str) -> None:
        if not 0 < len(pages) <= MAX_ROWS:
            raise KvdError(f"{len(pages)} pages do not fit a file of 1 to {MAX_ROWS:,}", "export fewer prefixes")
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
        self._fd = -1
        # Where payloads go is known before they are: they are laid out as if they were all of these zeros.
        blank = memoryview(mmap.mmap(-1, -(-max(page.length for page in pages) // ALIGN) * ALIGN))
        buffers = [(page, [blank[: -(-page.length // ALIGN) * ALIGN]] * page.shards) for page in pages]
        sheet = lay_out(buffers, [at(time.time())] * len(pages), node, _noted(specs))
        self._offsets = [sheet.rows[number].offset for number in range(len(pages))]
        with _as_errors(path, "written"):
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            offset = 0
            for part in sheet.parts:
                if part.obj is not blank.obj:
                    _write(self._fd, part, offset)
                offset += len(part)
            os.ftruncate(self._fd, sheet.size)

    def fill(self, number: int, shards: Sequence[bytes]) -> None:
        """The payload of a page, by its position among the pages."""
        offset = self._offsets[number]
        with _as_errors(self._path, "written"):
            for shard in shards:
                _write(self._fd, memoryview(shard), offset)
                offset += len(shard)

    def publish(self) -> None:
        """All payloads are there: make it durable and visible."""
        with _as_errors(self._path, "written"):
            os.fsync(self._fd)
            self._temporary.rename(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)


class SealedReader:
    """A file's pages: `rows` from its index, checked as a whole; `specs` from its metadata. `close` may come twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _as_errors(path, "read"):
            real = path.resolve(strict=True)
            size = real.stat().st_size
            if not real.is_file():
                raise KvdError(f"{path} is not a file", "give files of kvdctl export or *.pages.arrow")
            with real.open("rb") as file:
                if file.read(6) != b"ARROW1":
                    raise KvdError(f"{path} is not an Arrow file", "give files of kvdctl export or *.pages.arrow")
            self._depot, self._name = Folder(real.parent), real.name
            self.rows = index_of(self._depot, Entry(real.name, size), _NEWEST).rows
            self.specs = _specs_in(real)
        self._pool = ThreadPoolExecutor(_THREADS, "kvdctl-read")

    def read(self, numbers: Sequence[int]) -> list[list[memoryview] | None]:
        """Payloads of pages, a buffer per shard; None for those that are damaged."""
        wishes = []
        for position, number in enumerate(numbers):
            row = self.rows[number]
            room = -(-row.page.length // ALIGN) * ALIGN
            memory = memoryview(mmap.mmap(-1, room * row.page.shards))
            wishes.append(Wish(position, row, [memory[n * room : (n + 1) * room] for n in range(row.page.shards)]))
        found: list[list[memoryview] | None] = [None] * len(numbers)
        for _, wish, word in read_pages(self._depot, self._pool, {self._name: list(wishes)}):
            if word == GOOD:
                found[wish.number] = [buffer[: wish.row.page.length] for buffer in wish.buffers]
            elif word == UNREADABLE:
                raise KvdError(f"{self.path} cannot be read", "is its disk failing? copy it again")
        return found

    def close(self) -> None:
        self._pool.shutdown()
        self._depot.close()


def _noted(specs: Sequence[NamespaceSpec]) -> str:
    notes = [
        {
            "namespace": spec.digest.hex(), "page_bytes": spec.page_bytes, "page_tokens": spec.page_tokens,
            "shards": spec.shards, "pool": spec.pool, "label": spec.label, "family": spec.family.hex(),
        }
        for spec in specs
    ]  # fmt: skip
    return msgspec.json.encode(notes).decode()


class _Note(msgspec.Struct):
    namespace: str
    page_bytes: int
    page_tokens: int
    shards: int
    pool: str
    label: str
    family: str = ""


def _specs_in(path: Path) -> dict[bytes, NamespaceSpec]:
    """By digest; none in a file of a shared tier. Raises Unreadable."""
    try:
        with pa.OSFile(str(path)) as source:
            about = pa.ipc.open_file(source).schema.metadata or {}
        notes = msgspec.json.decode(about.get(NAMESPACES, b"[]"), type=list[_Note])
        specs = [
            NamespaceSpec(
                bytes.fromhex(note.namespace), note.page_bytes, note.page_tokens, 0, note.shards, note.pool[:64],
                note.label[:256], bytes.fromhex(note.family),
            )
            for note in notes
        ]  # fmt: skip
    except (pa.ArrowException, *UNDECODABLE) as error:
        raise Unreadable("damaged") from error
    if any(len(spec.digest) != NAMESPACE_BYTES or spec.page_tokens <= 0 for spec in specs):
        raise Unreadable("damaged")
    if any(len(spec.family) not in (0, NAMESPACE_BYTES) for spec in specs):
        raise Unreadable("damaged")
    return {spec.digest: spec for spec in specs}


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _as_errors(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        what, remedy = _WRONG.get(error.reason, _WRONG["damaged"])
        raise KvdError(f"{path} {what}", remedy) from error
    except OSError as error:
        remedy = "is the path right?" if done == "read" else "is the folder there, writable, and not full?"
        raise KvdError(f"{path} cannot be {done}: {error.strerror or error}", remedy) from error
