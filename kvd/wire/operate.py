"""What operators ask beyond that: decisions of the gate, where pages are, evictions, pins, shares of tenants."""

from kvd.wire.attach import NamespaceSpec
from kvd.wire.base import Message


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
