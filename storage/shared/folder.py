"""Sealed files in a folder: of a local disk, NFS, or a parallel file system.

A file is written under a temporary name, synced, renamed, and its folder synced: after kill -9 or power loss it is
there whole or not at all, beside temporary files that nobody opens. Bytes move between the caller's memory and the
file with one copy, or with none where the file system does O_DIRECT and everything is aligned. Nothing is ever
mapped: a shared file system that goes away must be an error, not a signal.
"""

import errno
import mmap
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa  # type: ignore[import-untyped]

from kvd.storage.failpoints import reach
from kvd.storage.shared.depot import TEMPORARY, Entry, Piece, ShortRead

ALIGN: Final = 4096
_MOST_PARTS: Final = 1024  # IOV_MAX
_MOST_AT_ONCE: Final = 16 << 20
_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW
# Gone since, or a file system that is read here only, or that takes no such call for folders.
_NOTHING_TO_SYNC: Final = (errno.ENOENT, errno.EROFS, errno.EINVAL, errno.ENOTSUP)

_gap = memoryview(mmap.mmap(-1, 16 << 10))  # where what lies between two payloads goes; nobody reads it


class Folder:
    """Implements `Depot`."""

    parallel = 2

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def entries(self) -> list[Entry]:
        reach("folder.list")
        found: list[Entry] = []
        for node in _listed(self._root):
            if node.is_dir(follow_symlinks=False):
                try:
                    listed = _listed(Path(node.path))
                except PermissionError:
                    continue  # no node's: lost+found, somebody else's
                for file in listed:
                    try:
                        if file.is_file(follow_symlinks=False):
                            found.append(Entry(f"{node.name}/{file.name}", file.stat(follow_symlinks=False).st_size))
                    except FileNotFoundError:
                        continue  # deleted, or renamed into place, while we look
        return found

    def settle(self, paths: Collection[str]) -> None:
        """A file has its name before its folder is synced: by the writer, or by who counts on it if that is sooner."""
        folders = {(self._root / path).parent for path in paths}
        for folder in (self._root, *folders) if folders else ():
            try:
                _sync(folder)
            except OSError as error:
                if error.errno not in _NOTHING_TO_SYNC:
                    raise

    def publish(self, path: str, parts: Sequence[memoryview], size: int, direct: bool) -> None:
        target = self._root / path
        if not target.parent.exists():
            target.parent.mkdir(exist_ok=True)
            _sync(self._root)
        temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY}")
        try:
            self._write(temporary, parts, size, direct and all(_aligned(part) for part in parts))
            reach("folder.rename")
            temporary.rename(target)
            reach("folder.renamed")
            _sync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, path: str, pieces: Sequence[Piece]) -> None:
        runs = _runs(pieces)
        direct = all(run.offset % ALIGN == 0 and all(map(_aligned, run.vector)) for run in runs)
        reach("folder.read")
        fd = self._open(path, direct)
        try:
            for run in runs:
                _read(fd, run.vector, run.offset, run.needed)
        finally:
            os.close(fd)

    def read_bytes(self, path: str, offset: int, length: int) -> bytes:
        fd = self._open(path, direct=False)
        try:
            found = os.pread(fd, length, offset)
        finally:
            os.close(fd)
        if len(found) != length:
            raise ShortRead(f"{path} ends before {offset + length}")
        return found

    def exists(self, path: str) -> bool:
        return (self._root / path).exists()

    def delete(self, path: str) -> None:
        reach("folder.delete")
        (self._root / path).unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is held between calls."""

    def _open(self, path: str, direct: bool) -> int:
        if direct:
            try:
                return os.open(self._root / path, os.O_RDONLY | os.O_DIRECT | _FLAGS)
            except FileNotFoundError:
                raise
            except OSError:
                pass  # no O_DIRECT here; what else may be wrong will be so again
        return os.open(self._root / path, os.O_RDONLY | _FLAGS)

    def _write(self, path: Path, parts: Sequence[memoryview], size: int, direct: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
        fd = -1
        if direct:
            try:
                fd = os.open(path, flags | os.O_DIRECT, 0o644)
            except OSError:
                path.unlink(missing_ok=True)  # the file is made before O_DIRECT is refused
        if fd < 0:
            fd = os.open(path, flags, 0o644)
        try:
            _allocate(fd, size)
            reach("folder.write")
            _write_all(fd, parts)
            os.ftruncate(fd, size)
            reach("folder.sync")
            os.fsync(fd)
        finally:
            os.close(fd)


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []


def _allocate(fd: int, size: int) -> None:
    """One extent instead of many, and "no space" before the first byte; not every file system can."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise


def _write_all(fd: int, parts: Sequence[memoryview]) -> None:
    at, offset = 0, 0
    left = list(parts)
    while at < len(left):
        written = os.pwritev(fd, left[at : at + _MOST_PARTS], offset)
        offset += written
        while at < len(left) and written >= len(left[at]):
            written -= len(left[at])
            at += 1
        if written:  # a part was written in part
            left[at] = left[at][written:]


@dataclass(slots=True)
class _Run:
    """Neighbouring pieces, to be read at once: a disk is fast when much is asked of it."""

    offset: int
    vector: list[memoryview]
    end: int
    needed: int  # bytes that must be there; what is rounded up to may be beyond the end of the file


def _runs(pieces: Sequence[Piece]) -> list[_Run]:
    runs: list[_Run] = []
    for piece in pieces:
        # One shard is read up to a multiple of 4096: files have room to there, and buffers.
        length = -(-piece.each // ALIGN) * ALIGN if len(piece.buffers) == 1 else piece.each
        vector = [buffer[:length] for buffer in piece.buffers]
        end, payload = piece.offset + length * len(vector), piece.each * len(vector)
        run = runs[-1] if runs else None
        if run and run.offset < piece.offset and 0 <= piece.offset - run.end <= len(_gap) and _has_room(run, vector):
            if gap := piece.offset - run.end:
                run.vector.append(_gap[:gap])
            run.vector += vector
            run.end, run.needed = end, piece.offset - run.offset + payload
        else:
            runs.append(_Run(piece.offset, vector, end, payload))
    return runs


def _has_room(run: _Run, vector: list[memoryview]) -> bool:
    return len(run.vector) + len(vector) < _MOST_PARTS and run.end - run.offset < _MOST_AT_ONCE


def _read(fd: int, vector: list[memoryview], offset: int, needed: int) -> None:
    """Fill the vector; more than `needed` bytes need not be there."""
    done, at = 0, 0
    while at < len(vector):
        got = os.preadv(fd, vector[at : at + _MOST_PARTS], offset + done)
        if got == 0:
            if done >= needed:
                return
            raise ShortRead(f"file ends at {offset + done}")
        done += got
        while at < len(vector) and got >= len(vector[at]):
            got -= len(vector[at])
            at += 1
        if got:
            vector[at] = vector[at][got:]


def _aligned(memory: memoryview) -> bool:
    return len(memory) % ALIGN == 0 and pa.py_buffer(memory).address % ALIGN == 0


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
