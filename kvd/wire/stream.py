"""A node's stream of prefix events: what kvd adds to SGLang's events, and the request for a snapshot.

Two ZeroMQ sockets. PUB: SGLang's own frames, `[topic][seq, 8 bytes big-endian][batch]`, see kvd.sglang_events; all
events of a batch are of one `Source`, and the first one carries a `Head` under the key "kvd", which others ignore.
Behind the topic, in its frame, is the same without tokens (kvd.brief): all that a router reads.
ROUTER: SGLang's replay (`[b""][seq]`), and `[b""][GetSnapshot]`, answered by `[b""][SnapshotPart]` until the last.

    seq    counts the batches of one life of kvd, from 0; `epoch` is another one in each life
    part   true when batch `seq` had been sent, and tells of no later one

A snapshot is made while the stream goes on, part by part, so its parts are of different moments. Who applies batches
and parts in the order of `seq`, a batch before the parts that bear its number, ends with what is true: each block's
last word is either its part or a batch after it.

Blocks travel as runs: (parent of the first, or None, hashes as signed 64-bit little-endian); each hash's parent is the
one before it. A hash is SGLang's event block hash for a worker's blocks, and the first 8 bytes of the page key, as a
signed big-endian number, for pages of kvd's own tiers: the same for requests without extra key, salt and adapter.
A batch of kvd's tiers has no tokens, and so says `block_size` 0: who indexes tokens must not look for any.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import msgspec

from kvd.wire.base import Message

TOPIC: Final = b"kvd"
RAM, NVME, SHARED = "CPU_TIER1", "DISK", "EXTERNAL"  # media of kvd's tiers; SGLang's are GPU and CPU_PINNED
PART_BLOCKS: Final = 4096
MOST_SPEEDS: Final = 16  # tiers of a node that say how fast they are

Hash = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Run = tuple[Hash | None, bytes]


class Speed(msgspec.Struct, frozen=True, array_like=True):
    """What loading from one of kvd's tiers takes on this node: `latency_s`, and then so many bytes a second."""

    medium: str
    bytes_per_s: Annotated[float, msgspec.Meta(gt=0)]
    latency_s: Annotated[float, msgspec.Meta(ge=0)]


class Source(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whose blocks: one rank of a worker (`worker` is its URL), or one namespace of kvd's own tiers (no worker).

    Neither: the node itself, which says once a second that it is there, and `speeds` of tiers that it has measured.
    """

    worker: str = ""
    rank: int = 0
    namespace: str = ""  # hex
    pool: str = ""  # of a namespace: "kv", a side pool's name, or "" until a worker said it
    label: str = ""
    tenant: str = ""
    block_tokens: int = 0  # 0: not known yet
    life: str = ""  # of a worker: see kvd.sglang_info
    strange: bool = False  # of a worker: it names its blocks otherwise than by kvd.pages
    workers: tuple[str, ...] = ()  # of a namespace: URLs of the workers that are attached with it
    speeds: Annotated[tuple[Speed, ...], msgspec.Meta(max_length=MOST_SPEEDS)] = ()


class Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """First in every batch. `why`: what the node misses of this source; "" where its blocks are exactly these."""

    node: str
    epoch: int
    source: Source
    why: str = ""


class GetSnapshot(Message, tag="get_snapshot", frozen=True):
    """All blocks of all sources. `request` comes back in the parts."""

    request: int


class SnapshotPart(Message, tag="part", frozen=True):
    """Some blocks that a source holds in one medium; a source without blocks has one part without a medium."""

    request: int
    node: str
    epoch: int
    seq: int  # -1: before the first batch
    source: Source | None  # None in the last part, which has no blocks
    why: str = ""
    medium: str = ""
    runs: list[Run] = []

    @property
    def last(self) -> bool:
        return self.source is None


def pack_hashes(hashes: Sequence[int]) -> bytes:
    """Signed 64-bit little-endian."""
    packed = array("q", hashes)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_hashes(raw: bytes) -> "array[int]":
    """The reverse. Raises ValueError for another length than a multiple of 8."""
    packed = array("q", raw)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed


def unpack_runs(runs: Iterable[Run]) -> "list[tuple[int | None, array[int]]]":
    """Each with its parent. Raises as `unpack_hashes`."""
    return [(parent, unpack_hashes(hashes)) for parent, hashes in runs]
