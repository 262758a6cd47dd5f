"""What the scheduler asks of a controller: one prefetch or one backup, with the side pools it touches."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

PLACEHOLDER = "__placeholder__"
"""The key a trailing transfer carries until the hit is known: until then only their number counts."""

_ids = itertools.count()


@dataclass(frozen=True)
class Side:
    """A side pool's part in one operation.

    window > 0: the last `window` pages of the span (Mamba 1, sliding window n); `host_indices` holds
    window * pool.page_size slots of that pool. from_pool="kv": every page of the span, in KV's slots.
    """

    pool: str
    host_indices: torch.Tensor | None = None
    window: int = 1
    from_pool: str | None = None

    @classmethod
    def kv_derived(cls, pool: str) -> "Side":
        """A pool that shares KV's slots and keys, page for page (an indexer, a draft model)."""
        return cls(pool, window=0, from_pool="kv")


@dataclass
class Operation:
    """One backup, or the common part of a prefetch. `completed_tokens` only grows."""

    hash_value: list[str]
    host_indices: torch.Tensor | None
    prefix_keys: list[str] | None
    transfers: list[Any] | None = None
    sides: Sequence[Side] = ()
    completed_tokens: int = 0
    pool_hits: dict[str, int] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    id: int = field(default_factory=lambda: next(_ids))


@dataclass
class Prefetch(Operation):
    """A prefetch. `all_keys` is the uncached span; `hash_value` what is left of it once the hit is known."""

    all_keys: list[str] = field(default_factory=list)
    staging: torch.Tensor | None = None  # the slots the scheduler has in hand for this request
    hit_pages: int | None = None  # None until every rank has answered
    revoked: bool = False  # the hit was below the threshold: nothing was read
    assume_stored: bool = False
    restorable: list[int] | None = None
    query_pool_hits: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _terminated: bool = False

    @property
    def request_id(self) -> str:
        return f"rid-{self.id}"

    def increment(self, tokens: int) -> bool:
        """Count these tokens as arrived; False, and nothing counted, once terminated."""
        with self._lock:
            if self._terminated:
                return False
            self.completed_tokens += tokens
            return True

    def mark_terminate(self) -> None:
        with self._lock:
            self._terminated = True

    def is_terminated(self) -> bool:
        with self._lock:
            return self._terminated
