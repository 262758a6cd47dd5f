"""Which prefix lengths all pools of a hybrid model can restore. Pure.

Source: sglang 0.5.23, srt/mem_cache/hicache_storage.py, HiCacheFile.batch_exists_v2. ALL_PAGES pools restore any
length up to their first missing page; TRAILING_PAGES pools (sliding window, state space) restore length p when the
last `window` pages before p are there; other policies never gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Pool:
    """One side pool: which of the leading KV pages it holds."""

    name: Any
    policy: str
    present: list[bool]
    window: int


def restorable(kv_pages: int, pools: Sequence[Pool]) -> tuple[dict[Any, int], list[int]]:
    """(deepest page per pool, every restorable length in pages, ascending)."""
    lengths = set(range(1, kv_pages + 1))
    hits: dict[Any, int] = {"kv": kv_pages}
    for pool in pools:
        if pool.policy == "all_pages":
            run = next((i for i, there in enumerate(pool.present) if not there), len(pool.present))
            own = set(range(1, run + 1))
        elif pool.policy == "trailing_pages":
            own = {p for p in range(1, kv_pages + 1) if all(pool.present[max(0, p - pool.window) : p])}
        else:
            hits[pool.name] = 0  # a pool left out would count as "all there"
            continue
        hits[pool.name] = max(own, default=0)
        lengths &= own
    return hits, sorted(lengths)
