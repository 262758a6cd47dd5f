"""What all messages share: their base, limits, and the rows that travel packed."""

import struct
from typing import Final

import msgspec

PROTOCOL: Final = 1
MAX_FRAME_BYTES: Final = 1 << 20  # from a peer; 8,192 keys are 256 KiB
MAX_REPLY_BYTES: Final = 64 << 20  # to an operator: `ls` of a large arena
MAX_KEYS: Final = 8192
TICKET_BYTES: Final = 16
FRAME: Final = struct.Struct("<I")

RESERVED_ROW: Final = struct.Struct("<QII")  # arena offset, generation, verdict
COMMIT_ROW: Final = struct.Struct("<QI16s")  # arena offset, generation, checksum
LEASED_ROW: Final = struct.Struct("<QII16s")  # arena offset, generation, length (0: absent), checksum
SCANNED_ROW: Final = struct.Struct("<QII16s16s32s")  # a leased row, namespace, key

WRITE, HELD, NO_ROOM = 0, 1, 2  # verdicts of RESERVED_ROW: only WRITE carries a place


class Message(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="t"):
    """Base of all messages."""
