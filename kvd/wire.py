"""Every message between kvd and its peers. Messages say where bytes are, never the bytes.

Two sockets, one union each way:

* `kvd.sock`, a unix stream: registration (with descriptors), liveness, reports, operators.
  A frame is a 4-byte little-endian length and that many bytes of msgpack.
* `kvd.data`, ZeroMQ DEALER -> ROUTER: the hot requests. A DEALER's routing id is the 16-byte ticket of its
  session followed by a channel number, so a message needs no credentials of its own.

Page keys travel joined (32 bytes each), and places as packed rows: decoding 128 of either is one call.
New fields come last and have a default; a field is never retyped; unknown fields are ignored.
"""

import struct
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from kvd.errors import PeerError

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


# -- kvd.sock: to the daemon -------------------------------------------------------------------------------


class Hello(Message, tag="hello", frozen=True):
    """First frame of a connection. A worker sends its lease table's descriptor along with it."""

    protocol: int
    role: Literal["worker", "tool"]
    label: str


class NamespaceSpec(Message, tag="ns", frozen=True):
    """One pool of one rank: what it stores and which shard of each page it holds."""

    digest: bytes
    page_bytes: int
    page_tokens: int
    shard: int
    shards: int
    pool: str
    label: str
    family: bytes = b""  # equal for pools of one model whose pages belong together
    scratch: bool = False  # its pages leave with the session; refused where anybody else has the namespace
    tenant: str = ""  # whose quota its pages count against


class Join(Message, tag="join", frozen=True):
    """Announce namespaces; the reply's ids are valid for this connection only."""

    namespaces: list[NamespaceSpec]


class Ping(Message, tag="ping", frozen=True):
    n: int


class Report(Message, tag="report", frozen=True):
    """What the plugin saw since it started: counters only grow. Not answered."""

    circuit: str
    counters: dict[str, int]


class GetStatus(Message, tag="get_status", frozen=True):
    pass


class GetPrefixes(Message, tag="get_prefixes", frozen=True):
    limit: int = 100


class Scan(Message, tag="scan", frozen=True):
    """Lease up to `limit` pages for reading, from group id `cursor` on: how `kvdctl verify` walks the arena."""

    cursor: int
    limit: int


class EndScan(Message, tag="end_scan", frozen=True):
    """Give a scan's lease back; `bad` are the rows whose bytes did not match their checksum."""

    lease: int
    bad: list[int] = []


class Check(Message, tag="check", frozen=True):
    """Check a part of the daemon's own invariants: of the pages from `cursor` on, at the end of all else."""

    cursor: int = 0


class GetDecisions(Message, tag="get_decisions", frozen=True):
    """What did the load-or-recompute gate decide lately?"""

    limit: int = 20


class FindPages(Message, tag="find_pages", frozen=True):
    """Which pages in RAM have keys that begin with `head` (hex)? In parts: of the pages from `cursor` on."""

    head: str
    namespace: bytes = b""  # empty: in all
    cursor: int = 0


class GetNamespace(Message, tag="get_ns", frozen=True):
    """What did a worker say about this namespace?"""

    digest: bytes


class GetChain(Message, tag="get_chain", frozen=True):
    """The keys from the first page of a prompt to this one."""

    namespace: bytes
    key: bytes


class EvictPages(Message, tag="evict", frozen=True):
    """Take a page and all that follow it out of RAM, in one namespace or in every one. In parts.

    Without a key: the whole namespace. With neither, and only if it says `everything`: all pages.
    """

    namespace: bytes = b""
    key: bytes = b""
    everything: bool = False
    cursor: int = 0


class RemoveBelow(Message, tag="remove_below", frozen=True):
    """Take the same out of all lower tiers. Answered when it is durable, which may take minutes."""

    namespace: bytes = b""
    key: bytes = b""
    everything: bool = False


class Pin(Message, tag="pin", frozen=True):
    """Keep the pages from a prompt's first to this one; or, with `keep` false, let them leave again."""

    namespace: bytes
    key: bytes
    keep: bool = True


class GetPins(Message, tag="get_pins", frozen=True):
    pass


class GetQuotas(Message, tag="get_quotas", frozen=True):
    pass


ToDaemon = (
    Hello | Join | Ping | Report | GetStatus | GetPrefixes | Scan | EndScan | Check
    | GetDecisions | FindPages | GetNamespace | GetChain | EvictPages | RemoveBelow
    | Pin | GetPins | GetQuotas
)  # fmt: skip


# -- kvd.sock: from the daemon -----------------------------------------------------------------------------


class Welcome(Message, tag="welcome", frozen=True):
    """Carries two descriptors: the arena and the index."""

    protocol: int
    epoch: int
    session: int
    ticket: bytes
    data_endpoint: str
    arena_bytes: int
    index_bytes: int
    version: str


class Joined(Message, tag="joined", frozen=True):
    ids: list[int]


class Pong(Message, tag="pong", frozen=True):
    """`faulted_bytes` of the arena exist by now: a worker may map them without being charged for them."""

    n: int
    faulted_bytes: int = 0


class Refusal(Message, tag="refusal", frozen=True):
    """The request was understood and refused."""

    reason: str
    hint: str = ""
    request: int = 0


class TierStatus(Message, tag="tier", frozen=True):
    name: str
    bytes_total: int
    bytes_used: int
    pages: int
    hits: int
    misses: int
    evicted: int
    free_extents: int
    extents: int
    prefaulted_bytes: int
    trouble: str = ""  # why it does not work at the moment
    counters: dict[str, int] = {}  # its own


class WorkerStatus(Message, tag="worker", frozen=True):
    session: int
    pid: int
    label: str
    attached_s: float
    pools: list[str]
    shard: str
    circuit: str
    leases: int
    reservations: int
    counters: dict[str, int]


class Status(Message, tag="status", frozen=True):
    version: str
    epoch: int
    pid: int
    uptime_s: float
    socket: str
    arena: str
    warm_pages: int
    tiers: list[TierStatus]
    workers: list[WorkerStatus]
    counters: dict[str, int]
    rss_bytes: int
    memlock_bytes: int  # -1: unlimited
    gpus: list[str]
    warnings: list[str]


class Prefix(Message, tag="prefix", frozen=True):
    """A chain's deepest page and what it stands for."""

    namespace: str
    label: str
    key: str
    pages: int
    tokens: int
    bytes: int
    idle_s: float
    leased: bool


class Prefixes(Message, tag="prefixes", frozen=True):
    prefixes: list[Prefix]
    total: int


class Scanned(Message, tag="scanned", frozen=True):
    """`next` is the cursor to go on from, or -1 at the end. A row of length 0: the page's header is damaged."""

    lease: int
    next: int
    rows: bytes


class Checked(Message, tag="checked", frozen=True):
    """`next` is the cursor of the next part, -1 after the last."""

    faults: list[str]
    pages: int
    next: int = -1


class GateDecision(Message, tag="decision", frozen=True):
    """Of `wanted` pages on a lower tier, `pages` were worth fetching, because of the rest; 0 is unknown."""

    age_s: float
    session: int
    pid: int
    worker: str
    pool: str
    tier: str
    wanted: int
    pages: int
    tier_bytes_per_s: float
    tier_bytes_queued: int
    prefill_tokens_per_s: float
    page_bytes: int  # of all shards
    page_tokens: int
    reason: str  # one of a few, for programs
    words: str  # the same, for people


class Decisions(Message, tag="decisions", frozen=True):
    """The newest first. `total` were made since kvd started; `tiers` are those below RAM."""

    decisions: list[GateDecision]
    total: int
    tiers: list[str]


class PageName(Message, tag="page_name", frozen=True):
    namespace: bytes
    key: bytes


class PagesFound(Message, tag="pages_found", frozen=True):
    """`next` is the cursor of the next part, -1 after the last. No more than a few dozen pages are named."""

    pages: list[PageName]
    next: int


class NamespaceKnown(Message, tag="ns_known", frozen=True):
    """`spec` is what was said last (its shard means nothing); None where nobody has joined it since kvd started."""

    spec: NamespaceSpec | None


class Chain(Message, tag="chain", frozen=True):
    """Keys of pages in RAM, the first of the prompt first; none if the page asked for is not in RAM.

    Where the chain is not whole, `missing` is the key of the page before the first one.
    """

    keys: bytes
    missing: bytes = b""


class Evicted(Message, tag="evicted", frozen=True):
    """`held` pages are being read, pinned, or come before such a page: they stayed. `next` as in `Checked`."""

    pages: int
    held: int
    next: int = -1


class TierRemoval(Message, tag="tier_removal", frozen=True):
    """`trouble`: what kept the tier from removing all; the rest may come back."""

    tier: str
    pages: int
    trouble: str = ""


class RemovedBelow(Message, tag="removed_below", frozen=True):
    tiers: list[TierRemoval]


class Pinned(Message, tag="pinned", frozen=True):
    """How many pages the pin keeps, or was the last to keep, and how much of all pins is in RAM."""

    pages: int
    bytes_in_ram: int


class OnePin(Message, tag="one_pin", frozen=True):
    """A pin, by the page that it ends with; how many pages it keeps, and how many of them are in RAM."""

    namespace: bytes
    key: bytes
    pages: int
    in_ram: int
    label: str


class Pins(Message, tag="pins", frozen=True):
    pins: list[OnePin]
    bytes_in_ram: int
    bytes_limit: int


class TenantShare(Message, tag="share", frozen=True):
    """What a tenant holds in one tier; `burst_bytes` None: no limit."""

    tenant: str
    tier: str
    held_bytes: int
    reserve_bytes: int
    burst_bytes: int | None


class Quotas(Message, tag="quotas", frozen=True):
    shares: list[TenantShare]


FromDaemon = (
    Welcome | Joined | Pong | Refusal | Status | Prefixes | Scanned | Checked
    | Decisions | PagesFound | NamespaceKnown | Chain | Evicted | RemovedBelow
    | Pinned | Pins | Quotas
)  # fmt: skip


# -- kvd.data ----------------------------------------------------------------------------------------------


class Lookup(Message, tag="lookup", frozen=True):
    """How many leading keys are held? The fallback of the shared-memory index, and what starts a fetch from below.

    The read that follows will wait `wait_s` for pages on their way. `before` pages of the chain come before these
    keys, the last of them is `parent`; 0 and empty where that is not known.
    """

    request: int
    ns: int
    keys: bytes
    ttl_s: float
    wait_s: float = 1.0
    before: int = 0
    parent: bytes = b""


class LeasePages(Message, tag="lease", frozen=True):
    """The answer may take `wait_s`, where pages are on their way from a lower tier."""

    request: int
    ns: int
    keys: bytes
    ttl_s: float
    wait_s: float = 0.0


class ReleaseLease(Message, tag="release", frozen=True):
    """Not answered. `bad` are indices of rows whose bytes did not match their checksum."""

    lease: int
    bad: list[int] = []


class ReservePages(Message, tag="reserve", frozen=True):
    """Ask for places to write `keys`, a chain whose first key's parent is `parent` (empty: not known)."""

    request: int
    ns: int
    keys: bytes
    ttl_s: float
    parent: bytes = b""
    chained: bool = True


class CommitPages(Message, tag="commit", frozen=True):
    """Pages in `rows` are whole. With `more` to come there is no answer; else what is left is given up."""

    request: int
    reservation: int
    rows: bytes
    more: bool = False


FromWorker = Lookup | LeasePages | ReleaseLease | ReservePages | CommitPages


class Found(Message, tag="found", frozen=True):
    request: int
    pages: int


class Leased(Message, tag="leased", frozen=True):
    """`lease` is 0 when no page was present."""

    request: int
    lease: int
    rows: bytes


class Reserved(Message, tag="reserved", frozen=True):
    request: int
    reservation: int
    rows: bytes


class Committed(Message, tag="committed", frozen=True):
    """How many pages of the reservation were taken in all."""

    request: int
    pages: int


ToWorker = Found | Leased | Reserved | Committed | Refusal

encode = msgspec.msgpack.Encoder().encode


def _decoder(union: Any) -> Callable[[bytes | bytearray | memoryview], Any]:
    decode = msgspec.msgpack.Decoder(union).decode

    def decode_or_blame(raw: bytes | bytearray | memoryview) -> Any:
        try:
            return decode(raw)
        except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
            # Not only DecodeError: msgspec 0.22 lets UnicodeDecodeError through for a bad string.
            raise PeerError(f"malformed message: {error}") from error

    return decode_or_blame


# Each raises PeerError for what is not a message of its union.
decode_to_daemon: Callable[[bytes | bytearray | memoryview], ToDaemon] = _decoder(ToDaemon)
decode_from_daemon: Callable[[bytes | bytearray | memoryview], FromDaemon] = _decoder(FromDaemon)
decode_from_worker: Callable[[bytes | bytearray | memoryview], FromWorker] = _decoder(FromWorker)
decode_to_worker: Callable[[bytes | bytearray | memoryview], ToWorker] = _decoder(ToWorker)


def frame(message: Message) -> bytes:
    """A message as it goes over kvd.sock."""
    body = encode(message)
    return FRAME.pack(len(body)) + body
