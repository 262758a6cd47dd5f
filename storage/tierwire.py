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
    kind: int
    offsets: list[int]

    @classmethod
    def of(cls, page: Page, offsets: list[int]) -> "Row":
        fixed = page.namespace, page.key, page.parent, page.length
        return cls(*fixed, list(page.checksums), page.tokens, page.kind, offsets)

    @property
    def page(self) -> Page:
        fixed = self.namespace, self.key, self.parent, self.length
        return Page(*fixed, tuple(self.checksums), self.tokens, self.kind)


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


class Judge(Message, tag="judge", frozen=True):
    """A density for each kind and age."""

    density: list[float]


class Used(Message, tag="used", frozen=True):
    """Pages that were used elsewhere, and a byte for the kind of each."""

    names: bytes
    kinds: bytes


class Remove(Message, tag="remove", frozen=True):
    """Remove a page and all that follow it, in one namespace or in every one; without a key all that is in it."""

    request: int
    namespace: bytes
    key: bytes


class Belongs(Message, tag="belongs", frozen=True):
    """The pages of this namespace are that tenant's."""

    namespace: bytes
    tenant: str


ToTier = Store | Load | Remove | Judge | Used | Belongs

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
    floor: float | None = None
    held: dict[str, int] = {}  # bytes of each tenant that has a share


class Stored(Message, tag="stored", frozen=True):
    """One flag per row."""

    request: int
    flags: list[bool]


class Loaded(Message, tag="loaded", frozen=True):
    """One per name; None: absent or damaged."""

    request: int
    rows: list[Row | None]


class Removed(Message, tag="removed", frozen=True):
    """A part of what a `Remove` removed, durably; the last part is empty and says so, and why it is not all."""

    request: int
    names: bytes
    over: bool
    trouble: str = ""


FromTier = Changed | Measured | Gauge | Stored | Loaded | Removed

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
