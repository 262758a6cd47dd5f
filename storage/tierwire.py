"""What kvd and the process of a lower tier say to each other, over a socket pair that kvd made.

Both ends are one installation, so there are no versions. Frames as on kvd.sock: a 4-byte little-endian length and
msgpack. Payloads never travel: the process maps the arena and moves them between it and its medium; `offsets` say
where each shard's buffer begins there. Names travel joined, 48 bytes each.
"""

import struct
from typing import Final

import msgspec

from kvd.storage.tier import NAME_BYTES, Page

FRAME: Final = struct.Struct("<I")


class Row(msgspec.Struct, array_like=True, frozen=True):
    """A page, and where its shards lie in the arena."""

    namespace: bytes
    key: bytes
    parent: bytes
    length: int
    checksums: list[bytes]
    tokens: int
    offsets: list[int]

    @classmethod
    def of(cls, page: Page, offsets: list[int]) -> "Row":
        return cls(page.namespace, page.key, page.parent, page.length, list(page.checksums), page.tokens, offsets)

    @property
    def page(self) -> Page:
        return Page(self.namespace, self.key, self.parent, self.length, tuple(self.checksums), self.tokens)


class Message(msgspec.Struct, frozen=True, tag_field="t"):
    """Base of all."""


# -- to the tier -------------------------------------------------------------------------------------------------


class Store(Message, tag="store", frozen=True):
    """Put these pages."""

    request: int
    rows: list[Row]


class Load(Message, tag="load", frozen=True):
    """Get these pages, each of as many shards as it has offsets, each shard of `length` bytes."""

    request: int
    length: int
    names: bytes
    offsets: list[list[int]]


ToTier = Store | Load

# -- from the tier -----------------------------------------------------------------------------------------------


class Changed(Message, tag="changed", frozen=True):
    """Names that came or left; at first, before the first `Gauge`, all that are held."""

    came: bytes
    left: bytes


class Measured(Message, tag="measured", frozen=True):
    """So many bytes were read in so many seconds, while nobody else asked for anything."""

    size: int
    seconds: float


class Gauge(Message, tag="gauge", frozen=True):
    """Said twice a second: how full it is, and that it lives. With `trouble` it is the last word."""

    pages: int
    bytes_used: int
    bytes_total: int
    counters: dict[str, int]
    trouble: str = ""


class Stored(Message, tag="stored", frozen=True):
    """One flag per row."""

    request: int
    flags: list[bool]


class Loaded(Message, tag="loaded", frozen=True):
    """One per name; None: absent or damaged."""

    request: int
    rows: list[Row | None]


FromTier = Changed | Measured | Gauge | Stored | Loaded

_encode = msgspec.msgpack.Encoder().encode
decode_to_tier = msgspec.msgpack.Decoder(ToTier).decode
decode_from_tier = msgspec.msgpack.Decoder(FromTier).decode


def frame(message: Message) -> bytes:
    body = _encode(message)
    return FRAME.pack(len(body)) + body


def take_frame(inbox: bytearray) -> bytes | None:
    """The first whole frame's body, taken out; None when there is none yet."""
    if len(inbox) < FRAME.size:
        return None
    end = FRAME.size + FRAME.unpack_from(inbox)[0]
    if len(inbox) < end:
        return None
    body = bytes(inbox[FRAME.size : end])
    del inbox[:end]
    return body


def split(names: bytes) -> list[bytes]:
    return [names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES)]
