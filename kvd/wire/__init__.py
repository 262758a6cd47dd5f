"""Every message between kvd and its peers. Messages say where bytes are, never the bytes.

Sockets, and one union each way:

* `kvd.sock`, a unix stream: registration (with descriptors), liveness, reports, operators.
  A frame is a 4-byte little-endian length and that many bytes of msgpack.
* `kvd.data`, ZeroMQ DEALER -> ROUTER: the hot requests. A DEALER's routing id is the 16-byte ticket of its
  session followed by a channel number, so a message needs no credentials of its own.
* the stream of prefix events and its snapshots, ZeroMQ PUB and ROUTER: see `stream`.

Page keys travel joined (32 bytes each), and places as packed rows: decoding 128 of either is one call.
New fields come last and have a default; a field is never retyped; unknown fields are ignored.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from kvd.errors import UNDECODABLE, PeerError
from kvd.wire.attach import *
from kvd.wire.base import *
from kvd.wire.data import *
from kvd.wire.operate import *
from kvd.wire.stream import *
from kvd.wire.watch import *

ToDaemon = (
    Hello | Join | Ping | Report | GetStatus | GetPrefixes | Scan | EndScan | Check
    | GetDecisions | FindPages | GetNamespace | GetChain | EvictPages | RemoveBelow
    | Pin | GetPins | GetQuotas
)  # fmt: skip
FromDaemon = (
    Welcome | Joined | Pong | Refusal | Status | Prefixes | Scanned | Checked
    | Decisions | PagesFound | NamespaceKnown | Chain | Evicted | RemovedBelow
    | Pinned | Pins | Quotas
)  # fmt: skip
FromWorker = Lookup | LeasePages | ReleaseLease | ReservePages | CommitPages
ToWorker = Found | Leased | Reserved | Committed | Refusal
ToStream = GetSnapshot
FromStream = SnapshotPart

encode = msgspec.msgpack.Encoder().encode


def _decoder(union: Any) -> Callable[[bytes | bytearray | memoryview], Any]:
    decode = msgspec.msgpack.Decoder(union).decode

    def decode_or_blame(raw: bytes | bytearray | memoryview) -> Any:
        try:
            return decode(raw)
        except UNDECODABLE as error:
            raise PeerError(f"malformed message: {error}") from error

    return decode_or_blame


# Each raises PeerError for what is not a message of its union.
decode_to_daemon: Callable[[bytes | bytearray | memoryview], ToDaemon] = _decoder(ToDaemon)
decode_from_daemon: Callable[[bytes | bytearray | memoryview], FromDaemon] = _decoder(FromDaemon)
decode_from_worker: Callable[[bytes | bytearray | memoryview], FromWorker] = _decoder(FromWorker)
decode_to_worker: Callable[[bytes | bytearray | memoryview], ToWorker] = _decoder(ToWorker)
decode_to_stream: Callable[[bytes | bytearray | memoryview], ToStream] = _decoder(ToStream)
decode_from_stream: Callable[[bytes | bytearray | memoryview], FromStream] = _decoder(FromStream)


def frame(message: Message) -> bytes:
    """A message as it goes over kvd.sock."""
    body = encode(message)
    return FRAME.pack(len(body)) + body
