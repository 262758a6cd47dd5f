"""Looking at kvd: status, prefixes held, walking the arena, checking invariants."""

from kvd.wire.base import Message


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
