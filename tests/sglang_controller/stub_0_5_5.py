"""The names of `sglang.srt.mem_cache.hicache_storage` in 0.5.5, in our own words."""

from dataclasses import dataclass

from tests.sglang_controller.keys import Token, page_key
from tests.sglang_controller.stub_common import StorageBase


def get_hash_str(token_ids: list[Token], prior_hash: str | None = None) -> str:
    return page_key(token_ids, prior_hash)


@dataclass
class HiCacheStorageConfig:
    """Six fields: no pipeline, context or data-parallel ranks, and nothing about metrics."""

    tp_rank: int
    tp_size: int
    is_mla_model: bool
    is_page_first_layout: bool
    model_name: str | None
    extra_config: dict[str, object] | None = None


@dataclass
class HiCacheStorageExtraInfo:
    """The default really is the tuple (None,), which is truthy. The controller passes a list or None."""

    prefix_keys: list[str] | None = (None,)  # type: ignore[assignment]
    extra_info: dict[str, object] | None = None


class HiCacheStorage(StorageBase):
    """As in 0.5.5: no v2 calls, no close, no on_host_pools_registered."""
