"""The footer of an Arrow IPC file, written by hand: pyarrow's writer cannot leave room between record batches.

Little-endian flatbuffer (format/File.fbs), n record batches. Offsets in it point forward from where they stand, so a
schema message as pyarrow wrote it is taken over whole, and the footer points into it:

    0    [root u32: 16]
    4    vtable  [its bytes u16: 12][table's bytes u16: 16][version u16][schema u16][dictionaries u16: 0][batches u16]
    16   table   [back to the vtable i32][version i16][0 u16][to the schema u32][to the batches u32]
    36   batches [n u32]  n x ([offset i64][header bytes i32][0 i32][body bytes i64])
    ...  the schema message, without the 8 bytes that frame it

In a file the footer is followed by its length (i32) and "ARROW1". Readers find everything through it; what lies
between the batches is nobody's.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Final

import pyarrow as pa  # type: ignore[import-untyped]

MAGIC: Final = b"ARROW1"
ENDING: Final = struct.Struct("<i6s")
_FRONT: Final = struct.Struct("<I6H ihHII 4x I")
_BLOCK: Final = struct.Struct("<qi4xq")
_COUNT: Final = struct.Struct("<36xI")  # of the batches
_FRAME: Final = struct.Struct("<iI")  # what stands before a message: -1, length
_V5: Final = 4  # MetadataVersion
_SCHEMA_FIELD: Final = 24
_HEADER_SLOT: Final = 2  # Message.header: third field of its table

Block = tuple[int, int, int]  # offset, bytes of the header with its frame, bytes of the body

assert _FRONT.size == 40


def footer(schema_message: bytes, blocks: Sequence[Block]) -> bytes:
    """The footer with its length and magic: the end of the file."""
    (_, length) = _FRAME.unpack_from(schema_message)
    message = schema_message[_FRAME.size : _FRAME.size + length]
    at = _FRONT.size + _BLOCK.size * len(blocks)
    to_schema = at + _schema_in(message) - _SCHEMA_FIELD
    front = _FRONT.pack(16, 12, 16, 4, 8, 0, 12, 12, _V5, 0, to_schema, 8, len(blocks))
    body = b"".join((front, *(_BLOCK.pack(*block) for block in blocks), message))
    return body + ENDING.pack(len(body), MAGIC)


def metadata(footer: bytes) -> Mapping[bytes, bytes]:
    """The schema's metadata out of a footer made here, without its length and magic. Nothing where it is damaged."""
    try:
        (batches,) = _COUNT.unpack_from(footer)
        message = footer[_FRONT.size + _BLOCK.size * batches :]
        schema = pa.ipc.read_schema(pa.py_buffer(_FRAME.pack(-1, len(message)) + message))
    except (struct.error, pa.ArrowException, OSError):
        return {}
    return schema.metadata or {}


def _schema_in(message: bytes) -> int:
    """Where the Schema table begins in a schema message."""
    (table,) = struct.unpack_from("<I", message)
    (back,) = struct.unpack_from("<i", message, table)
    (field,) = struct.unpack_from("<H", message, table - back + 4 + 2 * _HEADER_SLOT)
    (forward,) = struct.unpack_from("<I", message, table + field)
    return int(table + field + forward)
