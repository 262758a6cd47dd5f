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
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        about = table.schema.metadata or {}
        if about.get(b"kvd.graves", b"") != str(VERSION).encode():
            raise Unreadable("version" if b"kvd.graves" in about else "foreign")
        parts = (table.column(column).to_pylist() for column in ("namespace", "key", "stamp"))
        graves = {namespace + key: stamp for namespace, key, stamp in zip(*parts, strict=True)}
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise Unreadable("damaged") from error
    if about.get(b"kvd.seal") != _seal(graves).encode() or any(stamp > newest for stamp in graves.values()):
        raise Unreadable("damaged")
    return graves


def _seal(graves: Mapping[Name, int]) -> str:
    rows = b"".join(name + stamp.to_bytes(8, "little") for name, stamp in graves.items())
    return xxhash.xxh3_128_hexdigest(rows)
