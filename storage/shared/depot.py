"""Where sealed files are kept: the little that a folder and a bucket have in common.

Paths are relative: "node/file". Files are published whole, never changed, and deleted by anyone. All methods raise
OSError; FileNotFoundError means that the file is not there, and nothing else.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from kvd.storage.tier import Buffers

TEMPORARY = ".tmp"  # how names of files end that are being written


class Entry(NamedTuple):
    path: str
    size: int


class ShortRead(OSError):
    """The file ends before what was asked of it."""


class Piece(NamedTuple):
    """Bytes to be read from one place of a file: into each buffer `each` bytes, one after the other.

    A buffer is at least `each` bytes rounded up to 4096 long; what is beyond `each` may be overwritten.
    """

    offset: int
    buffers: Buffers
    each: int


class Depot(Protocol):
    parallel: int  # how many reads at once are worth it

    def entries(self) -> list[Entry]:
        """Everything there, one folder deep; a file published before the call began is in it."""
        ...

    def settle(self, paths: Collection[str]) -> None:
        """Files that were listed here survive power loss when this returns, as if their writers had come so far."""
        ...

    def publish(self, path: str, parts: Sequence[memoryview], size: int, direct: bool) -> None:
        """Make a file of the parts' first `size` bytes. Durable, and visible as a whole, when it returns."""
        ...

    def read(self, path: str, pieces: Sequence[Piece]) -> None: ...

    def read_bytes(self, path: str, offset: int, length: int) -> bytes: ...

    def exists(self, path: str) -> bool: ...

    def delete(self, path: str) -> None:
        """A file that is not there is no error."""
        ...

    def close(self) -> None:
        """May be called twice."""
        ...
