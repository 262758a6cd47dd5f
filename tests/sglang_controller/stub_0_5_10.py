"""The names of `sglang.srt.mem_cache.hicache_storage` in 0.5.10, in our own words."""

from dataclasses import dataclass
from enum import Enum

import torch

from tests.sglang_controller.keys import Token, event_hash, page_key
from tests.sglang_controller.stub_common import StorageBaseV2


def get_hash_str(token_ids: list[Token], prior_hash: str | None = None) -> str:
    return page_key(token_ids, prior_hash)


def hash_str_to_int64(hash_str: str) -> int:
    return event_hash(hash_str)


@dataclass
class HiCacheStorageConfig:
    """Pipeline ranks, metrics flag and head splitting are new; no context- or data-parallel ranks yet."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    extra_config: dict[str, object] | None = None


@dataclass
class HiCacheStorageExtraInfo:
    """Same odd default as 0.5.5."""

    prefix_keys: list[str] | None = (None,)  # type: ignore[assignment]
    extra_info: dict[str, object] | None = None


class PoolName(str, Enum):  # noqa: UP042 - str() of a member must stay "PoolName.KV", as in the release
    KV = "kv"
    MAMBA = "mamba"


class PoolHitPolicy(str, Enum):  # noqa: UP042
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"


@dataclass
class PoolTransfer:
    name: PoolName
    host_indices: torch.Tensor | None = None
    device_indices: torch.Tensor | None = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    """Two fields: a third, passed by position or name, is a TypeError here."""

    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]

    @classmethod
    def empty(cls) -> "PoolTransferResult":
        return cls(0, {})


class HiCacheStorage(StorageBaseV2):
    """As in 0.5.10: v2 calls exist, on_host_pools_registered does not."""
