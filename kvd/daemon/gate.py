"""Load or recompute: how much of what lies below RAM is worth fetching for one request. Pure: time is a number.

A page that is fetched costs its share of the disk, and before it whatever is on its way already; a page that is not
costs the worker the prefill of its tokens. Both are measured: the tier while it is busy (kvd.daemon.speed); the worker
by its plugin, from what it computed after lookups that missed (kvd.sidecar.prefill). A hit is shortened to the longest
prefix that can be here before its reader stops waiting, and given up unless

    latency + (others' bytes on the way + the prefix's bytes) / bytes per second  <=  SURE * what the prefix saves

What the same reader waits for anyway is not counted: it is there when the prefix's turn comes. A disk that nobody has
measured is not asked in a request's way: a few pages are fetched beside it, and that is the measurement. One that did
not pay some time ago is measured again like that; one that is silent, though it was asked for something, is asked for
nothing more meanwhile. A worker that has computed nothing yet is given what can be here in time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from kvd.daemon.speed import Disk

STALE_AFTER_S = 10.0  # a measurement that forbids
DOUBTED_AFTER_S = 1.0  # one that the last load contradicts
WAIT_S = 1.0  # a reader waits as long, unless it says otherwise
SURE = 0.8  # near break-even nothing is won, and what is mistaken would be paid for
PROBE_PAGES = 2

Reason = Literal["pays", "untried", "stale", "silent", "speed unknown", "late", "slower", "queue", "no use"]
WORDS: Final[dict[Reason, str]] = {
    "pays": "all of it pays: loading takes less time than computing",
    "untried": "never measured: a few pages are fetched beside the request, to find out",
    "stale": "it did not pay when last measured; a few pages are fetched beside the request, to find out again",
    "silent": "what it was asked for should have been here for long: it hangs, and nobody waits for it",
    "speed unknown": "here in time; how fast this worker computes is not known yet",
    "late": "the rest would not be here before the reader gives up",
    "slower": "loading takes longer than computing, or hardly less",
    "queue": "what is on its way already takes longer than computing this",
    "no use": "this worker takes as long over tokens that it has as over those that it computes",
}


@dataclass(frozen=True, slots=True)
class Prefill:
    """What computing costs a worker, in seconds: see kvd.sidecar.prefill."""

    token_s: float
    pair_s: float = 0.0
    cached_s: float = 0.0

    @classmethod
    def of(cls, counters: Mapping[str, int]) -> "Prefill":
        """As its plugin reports it; all zero: not known."""
        token, pair = counters.get("prefill_ns_per_token", 0), counters.get("prefill_fs_per_pair", 0)
        return cls(1e-9 * token, 1e-15 * pair, 1e-9 * counters.get("prefill_ns_per_cached_token", 0))

    @property
    def known(self) -> bool:
        return self.token_s > 0 or self.pair_s > 0

    def saved_s(self, before: int, tokens: int) -> float:
        """By not computing `tokens` that come after `before` others; below zero where having them costs more."""
        return tokens * (self.token_s - self.cached_s + self.pair_s * (before + tokens / 2))


@dataclass(frozen=True, slots=True)
class Decision:
    """How many of `wanted` pages to fetch, and from what that follows; 0.0 is unknown."""

    pages: int
    wanted: int
    disk_bytes_per_s: float
    prefill_tokens_per_s: float  # tokens that need not be computed, by the seconds which that saves
    bytes_on_the_way: int
    page_bytes: int  # of all shards
    page_tokens: int
    reason: Reason
    load_s: float = 0.0  # of what can be here in time
    saved_s: float = 0.0
    probe: int = 0  # pages to fetch all the same, for nobody: the disk has to be measured


def decide(
    disk: Disk, wanted: int, page_bytes: int, page_tokens: int, prefill: Prefill, now: float,
    before: int = 0, own: int = 0, wait_s: float = WAIT_S,
) -> Decision:  # fmt: skip
    """For a prefix of `wanted` pages that are on this disk, after `before` tokens that are not.

    `page_bytes` are of all shards; `own` of the bytes on the way are for the same reader, before these.
    """
    queued = disk.on_the_way - own
    if disk.late_at <= now:
        return Decision(0, wanted, disk.bytes_per_s, 0.0, queued, page_bytes, page_tokens, "silent")
    if not disk.known:
        known, pages = prefill.known, 0 if prefill.known else wanted
        probe = min(wanted, PROBE_PAGES) if known else 0
        reason: Reason = "untried" if known else "speed unknown"
        return Decision(pages, wanted, 0.0, 0.0, queued, page_bytes, page_tokens, reason, probe=probe)
    in_time = int(((wait_s - disk.latency_s) * disk.bytes_per_s - queued) // page_bytes)
    pages = min(wanted, max(0, in_time))
    queue_s, own_s = queued / disk.bytes_per_s, disk.latency_s + pages * page_bytes / disk.bytes_per_s
    tokens = pages * page_tokens
    saved_s = prefill.saved_s(before, tokens)
    reason = "late" if pages < wanted else "pays" if prefill.known else "speed unknown"
    probe = 0
    if prefill.known and pages and queue_s + own_s > SURE * saved_s:
        pages, reason = 0, "no use" if saved_s <= 0 else "slower" if own_s > SURE * saved_s else "queue"
    if not pages and not disk.on_the_way and now - disk.measured_at > _good_for_s(disk):
        probe, reason = min(wanted, PROBE_PAGES), "stale"
    rate = tokens / saved_s if saved_s > 0 else 0.0
    return Decision(
        pages, wanted, disk.bytes_per_s, rate, queued, page_bytes, page_tokens, reason, queue_s + own_s, saved_s, probe
    )


def _good_for_s(disk: Disk) -> float:
    return DOUBTED_AFTER_S if disk.doubtful else STALE_AFTER_S
