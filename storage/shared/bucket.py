"""Sealed files on any pyarrow filesystem: S3 and what speaks it, GCS, Azure, HDFS.

An upload is atomic: an object appears when its last part is acknowledged, and names are never used twice, so no
conditional write is needed (many servers accept the header and ignore it). What an interrupted upload leaves in S3 is
invisible; a lifecycle rule of the bucket removes it. Objects never change, so open handles are kept for a while.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import fs

from kvd.storage.failpoints import reach
from kvd.storage.shared.depot import Entry, Piece, ShortRead

_HANDLES: Final = 64
_PART: Final = 16 << 20  # bytes handed over at once
_GAP: Final = 64 << 10


class Bucket:
    """Implements `Depot`."""

    parallel = 8

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self._fs: Any = filesystem
        self._root = root.rstrip("/")
        self._lock = threading.Lock()
        self._handles: OrderedDict[str, Any] = OrderedDict()  # the oldest use first

    def entries(self) -> list[Entry]:
        reach("bucket.list")
        with _as_os_errors():
            found = self._fs.get_file_info(fs.FileSelector(self._root, recursive=True, allow_not_found=True))
        skip = len(self._root) + 1
        return [Entry(info.path[skip:], info.size) for info in found if info.type == fs.FileType.File]

    def settle(self, paths: Collection[str]) -> None:
        """An object is seen when it is kept."""

    def publish(self, path: str, parts: Sequence[memoryview], size: int, direct: bool) -> None:
        with _as_os_errors():
            if not isinstance(self._fs, fs.S3FileSystem):  # which knows no folders
                self._fs.create_dir(self._at(path).rpartition("/")[0], recursive=True)
            stream = self._fs.open_output_stream(self._at(path))
            try:
                reach("bucket.write")
                for chunk in _chunks(parts, size):
                    stream.write(chunk)
                    reach("bucket.written")
            except BaseException:
                self._give_up(path, stream)
                raise
            stream.close()
        reach("bucket.published")

    def _give_up(self, path: str, stream: Any) -> None:
        """pyarrow cannot abandon an upload: what was written so far appears when the stream is closed."""
        with suppress(OSError, pa.ArrowException):
            stream.close()
            self._fs.delete_file(self._at(path))

    def read(self, path: str, pieces: Sequence[Piece]) -> None:
        reach("bucket.read")
        for group in _neighbours(pieces):
            start = group[0].offset
            found = memoryview(self.read_bytes(path, start, _end(group[-1]) - start))
            for piece in group:
                for at, buffer in enumerate(piece.buffers):
                    begin = piece.offset - start + at * piece.each
                    buffer[: piece.each] = found[begin : begin + piece.each]

    def read_bytes(self, path: str, offset: int, length: int) -> bytes:
        with self._lock:
            known = self._handles.get(path)
        if known is not None:
            try:
                return self._read(path, known, offset, length)
            except OSError:
                with self._lock:
                    self._handles.pop(path, None)  # deleted since? A new handle tells
        with _as_os_errors():
            handle = self._fs.open_input_file(self._at(path))
        return self._read(path, handle, offset, length)

    def exists(self, path: str) -> bool:
        with _as_os_errors():
            return bool(self._fs.get_file_info(self._at(path)).type == fs.FileType.File)

    def delete(self, path: str) -> None:
        reach("bucket.delete")
        with self._lock:
            self._handles.pop(path, None)
        try:
            with _as_os_errors():
                self._fs.delete_file(self._at(path))
        except FileNotFoundError:
            pass

    def close(self) -> None:
        with self._lock:
            self._handles.clear()
            self._fs = None  # which ends its connections

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _read(self, path: str, handle: Any, offset: int, length: int) -> bytes:
        with _as_os_errors():
            if offset + length > handle.size():
                raise ShortRead(f"{path} ends before {offset + length}")
            found: bytes = handle.read_at(length, offset)
        with self._lock:
            self._handles[path] = handle
            self._handles.move_to_end(path)
            while len(self._handles) > _HANDLES:
                self._handles.popitem(last=False)
        if len(found) != length:
            raise ShortRead(f"{path} brought {len(found)} of {length} bytes")
        return found


def _neighbours(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """What is worth one request: a request costs more than the few bytes between."""
    group: list[Piece] = []
    for piece in pieces:
        near = group and 0 <= piece.offset - _end(group[-1]) <= _GAP and _end(piece) - group[0].offset <= _PART
        if group and not near:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _end(piece: Piece) -> int:
    return piece.offset + piece.each * len(piece.buffers)


def _chunks(parts: Sequence[memoryview], size: int) -> Iterator[memoryview]:
    for part in parts:
        for at in range(0, min(len(part), size), _PART):
            yield part[at : min(at + _PART, size)]
        size -= min(len(part), size)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """pyarrow raises OSError for most of what a server does, and its own errors for the rest."""
    try:
        yield
    except pa.ArrowException as error:
        if isinstance(error, OSError):
            raise
        raise OSError(str(error)) from error
