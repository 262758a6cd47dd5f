"""What was removed from files that never change: small Arrow IPC files beside them.

A row is namespace, key, stamp: copies of that page with this stamp or an older one are dead, in every file, also in
one that a compaction which did not know makes later. The schema's metadata holds the version and "kvd.seal", the
xxh3-128 of all rows, since a flipped stamp could hide pages that were never removed.
"""

from collections.abc import Mapping
from typing import Final

import pyarrow as pa  # type: ignore[import-untyped]
import xxhash

from kvd.storage.shared.sealed import Unreadable
from kvd.storage.tier import Name

VERSION: Final = 1
MAX_BYTES: Final = 64 << 20
MOST_NAMES: Final = 1 << 19  # in a file: they take half of that
_COLUMNS: Final = [("namespace", pa.binary(16)), ("key", pa.binary(32)), ("stamp", pa.uint64())]


def encode(graves: Mapping[Name, int]) -> bytes:
    """The file that says so."""
    names, stamps = list(graves), list(graves.values())
    about = {"kvd.graves": str(VERSION), "kvd.seal": _seal(graves)}
    columns = {
        "namespace": pa.array([name[:16] for name in names], pa.binary(16)),
        "key": pa.array([name[16:] for name in names], pa.binary(32)),
        "stamp": pa.array(stamps, pa.uint64()),
    }
    table = pa.table(columns).replace_schema_metadata(about)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def decode(data: bytes, newest: int) -> dict[Name, int]:
    """Raises Unreadable."""
    try:
        file = pa.ipc.open_file(pa.BufferReader(data))
        about = file.schema.metadata or {}
        if about.get(b"kvd.graves", b"") != str(VERSION).encode():
            raise Unreadable("version" if b"kvd.graves" in about else "foreign")
        if [(field.name, field.type) for field in file.schema] != _COLUMNS:
            raise Unreadable("damaged")
        table = file.read_all()
        table.validate(full=True)  # Arrow believes what it reads: an offset that was flipped is followed anywhere
        if any(column.null_count for column in table.columns):
            raise Unreadable("damaged")
        parts = (column.to_pylist() for column in table.columns)
        graves = {namespace + key: stamp for namespace, key, stamp in zip(*parts, strict=True)}
        right = about.get(b"kvd.seal") == _seal(graves).encode()
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise Unreadable("damaged") from error
    if not right or any(stamp > newest for stamp in graves.values()):
        raise Unreadable("damaged")
    return graves


def _seal(graves: Mapping[Name, int]) -> str:
    rows = b"".join(name + stamp.to_bytes(8, "little") for name, stamp in graves.items())
    return xxhash.xxh3_128_hexdigest(rows)
