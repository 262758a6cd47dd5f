"""Load or recompute: how much of what lies below RAM is worth fetching for one request. Pure: time is a number.

A page that is fetched costs its share of the disk, and before it whatever is on its way already; a page that is not
costs the worker the prefill of its tokens. Both are measured while they happen: what the tier brings per second while
it is busy; by the plugin, how fast its worker computed what a lookup had missed. A hit is shortened to the longest
prefix for which

    (bytes on the way + the prefix's bytes) / bytes per second  <=  the prefix's tokens / prefill tokens per second

and which can be here before the reader stops waiting. What was never measured does not forbid: the first load is the
measurement; and a measurement that forbids goes stale, so that a disk that has recovered is found out.
"""

from dataclasses import dataclass
from typing import Final, Literal

STALE_AFTER_S = 30.0
WAIT_S = 1.0  # a reader waits as long (half of the plugin's get_timeout_s)
_NEW = 0.3  # weight of a new measurement of the disk
_WHOLE_BYTES = 4 << 20  # a measurement of less weighs less: it is of the way there, not of the disk
_PERIOD_S = 0.05


Reason = Literal["pays", "untried", "stale", "speed unknown", "late", "slower", "queue"]
WORDS: Final[dict[Reason, str]] = {
    "pays": "all of it pays: loading takes less time than computing",
    "untried": "never measured: tried, to find out",
    "stale": f"last measured more than {STALE_AFTER_S:.0f} s ago: tried again",
    "speed unknown": "here in time; how fast this worker computes is not known yet",
    "late": f"the rest would not be here before the reader gives up, after {WAIT_S:g} s",
    "slower": "the tier is slower than computing",
    "queue": "what is on its way already takes longer than computing this",
}


@dataclass(slots=True)
class Disk:
    """What one lower tier was measured to do, over the time that it was busy."""

    bytes_per_s: float = 0.0  # 0: never measured
    measured_at: float = 0.0
    on_the_way: int = 0  # bytes
    _since: float = 0.0
    _came: int = 0

    def begun(self, size: int, now: float) -> None:
        if not self.on_the_way:
            self._since, self._came = now, 0
        self.on_the_way += size

    def ended(self, size: int, came: int, now: float) -> None:
        """`came` of the `size` bytes that were asked for."""
        self.on_the_way -= size
        self._came += came
        if (now - self._since >= _PERIOD_S or not self.on_the_way) and self._came and now > self._since:
            rate, weight = self._came / (now - self._since), _NEW * min(1.0, self._came / _WHOLE_BYTES)
            self.bytes_per_s = rate if not self.bytes_per_s else (1 - weight) * self.bytes_per_s + weight * rate
            self.measured_at = now
            self._since, self._came = now, 0


@dataclass(frozen=True, slots=True)
class Decision:
    """How many of `wanted` pages to fetch, and from what that follows; 0.0 is unknown."""

    pages: int
    wanted: int
    disk_bytes_per_s: float
    prefill_tokens_per_s: float
    bytes_on_the_way: int
    page_bytes: int  # of all shards
    page_tokens: int
    reason: Reason


def decide(
    disk: Disk, wanted: int, page_bytes: int, page_tokens: int, prefill_tokens_per_s: float, now: float
) -> Decision:
    """For a prefix of `wanted` pages that are on this disk. `page_bytes` are of all shards."""
    pages, reason = _choose(disk, wanted, page_bytes, page_tokens, prefill_tokens_per_s, now)
    return Decision(
        pages, wanted, disk.bytes_per_s, prefill_tokens_per_s, disk.on_the_way, page_bytes, page_tokens, reason
    )


def _choose(
    disk: Disk, wanted: int, page_bytes: int, page_tokens: int, prefill_tokens_per_s: float, now: float
) -> tuple[int, Reason]:
    if not disk.bytes_per_s:
        return wanted, "untried"
    if now - disk.measured_at > STALE_AFTER_S:
        return wanted, "stale"
    in_time = int((WAIT_S * disk.bytes_per_s - disk.on_the_way) // page_bytes)
    worth = min(wanted, max(0, in_time))
    known = prefill_tokens_per_s > 0 and page_tokens > 0
    if known:
        queued = disk.on_the_way / disk.bytes_per_s
        gained = page_tokens / prefill_tokens_per_s - page_bytes / disk.bytes_per_s  # a page, in seconds
        if gained * worth < queued:
            return 0, "slower" if gained <= 0 else "queue"
    if worth < wanted:
        return worth, "late"
    return worth, "pays" if known else "speed unknown"
