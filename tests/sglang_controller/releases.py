"""What each release hands a plugin: config fields, types, defaults. Everything here is frozen.

The stub modules hold the types; a `Release` says where SGLang keeps them and how it fills the config.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from tests.sglang_controller.stub_common import StorageMetrics

BATCH_PAGES = 128
"""Pages a get or set call carries at most, in every release; also an exists call, except where noted."""


@dataclass(frozen=True)
class Release:
    """One SGLang release as a plugin can see it."""

    version: str
    stub: ModuleType
    metrics_module: str  # where StorageMetrics lives
    hash_module: str  # where get_hash_str lives
    pool_module: str  # where HostKVCache lives
    interface_v1: bool  # whether a dynamic backend may choose the zero-copy calls
    catches_storage_errors: bool  # else an exception ends the storage thread without a word
    prefetch_policy: str  # default of --hicache-storage-prefetch-policy
    metrics_class: type[Any] = StorageMetrics

    @property
    def config_fields(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.stub.HiCacheStorageConfig))

    def config(self, **values: Any) -> Any:
        """A HiCacheStorageConfig of this release; naming a field it lacks is an AttributeError."""
        unknown = set(values) - set(self.config_fields)
        if unknown:
            raise AttributeError(f"SGLang {self.version} has no config field {sorted(unknown)}")
        defaults: dict[str, Any] = {
            "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
            "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": False,
            "model_name": "sim-model", "extra_config": {},
        }  # fmt: skip
        known = {name: value for name, value in defaults.items() if name in self.config_fields}
        return self.stub.HiCacheStorageConfig(**known | values)

    def transfer(self, **values: Any) -> Any:
        """A PoolTransfer of this release, without the fields it does not have."""
        names = {field.name for field in fields(self.stub.PoolTransfer)}
        return self.stub.PoolTransfer(**{name: value for name, value in values.items() if name in names})


@dataclass(frozen=True)
class BackendOptions:
    """The extra config as the tree cache splits it: these four are popped before a plugin sees the rest."""

    rest: dict[str, Any]
    prefetch_threshold: int
    prefetch_timeout_base_s: float
    prefetch_timeout_per_ki_token_s: float
    pass_prefix_keys: bool


def backend_options(release: Release, extra_config: Mapping[str, Any]) -> BackendOptions:
    """Parse the command line's JSON; ValueError where the release refuses to start."""
    rest: dict[str, Any] = json.loads(json.dumps(dict(extra_config)))
    threshold = rest.pop("prefetch_threshold", 256)
    base = rest.pop("prefetch_timeout_base", 1)
    per_ki = rest.pop("prefetch_timeout_per_ki_token", 0.25)
    prefixes = rest.pop("hicache_storage_pass_prefix_keys", False)
    if not isinstance(threshold, int):
        raise ValueError(f"prefetch_threshold must be int, got {type(threshold).__name__}")
    for value in (base, per_ki):
        if not isinstance(value, int | float):
            raise ValueError(f"prefetch timeouts must be numbers, got {type(value).__name__}")
    if release.version != "0.5.5" and not isinstance(prefixes, bool):
        raise ValueError(f"hicache_storage_pass_prefix_keys must be bool, got {type(prefixes).__name__}")
    return BackendOptions(rest, threshold, float(base), float(per_ki), bool(prefixes))


def _stub(name: str) -> ModuleType:
    return importlib.import_module(f"tests.sglang_controller.{name}")


R055 = Release(
    version="0.5.5",
    stub=_stub("stub_0_5_5"),
    metrics_module="sglang.srt.metrics.collector",
    hash_module="sglang.srt.mem_cache.hicache_storage",
    pool_module="sglang.srt.mem_cache.memory_pool_host",
    interface_v1=False,
    catches_storage_errors=False,
    prefetch_policy="best_effort",
)
R0510 = Release(
    version="0.5.10",
    stub=_stub("stub_0_5_10"),
    metrics_module="sglang.srt.observability.metrics_collector",
    hash_module="sglang.srt.mem_cache.hicache_storage",
    pool_module="sglang.srt.mem_cache.memory_pool_host",
    interface_v1=True,
    catches_storage_errors=False,
    prefetch_policy="best_effort",
)
R0523 = Release(
    version="0.5.23",
    stub=_stub("stub_0_5_23"),
    metrics_module="sglang.srt.observability.metrics_collector",
    hash_module="sglang.srt.mem_cache.utils",
    pool_module="sglang.srt.mem_cache.pool_host",
    interface_v1=True,
    catches_storage_errors=True,
    prefetch_policy="timeout",
)
RELEASES = {release.version: release for release in (R055, R0510, R0523)}
