"""What the storage base class of all releases shares: five abstract methods, defaults that do nothing.

Plugins inherit these by accident, so they matter: v1 get and set answer None, batch_exists loops exists().
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch


class StorageBase(ABC):
    """The surface of 0.5.5. `register_mem_pool_host` is the only registration that release knows."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return None  # type: ignore[return-value]  # so it is: a plugin that forgets this breaks its caller

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return None  # type: ignore[return-value]

    @abstractmethod
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None: ...

    @abstractmethod
    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None] | int: ...

    @abstractmethod
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool: ...

    @abstractmethod
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool: ...

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return next((i for i, key in enumerate(keys) if not self.exists(key)), len(keys))

    def clear(self) -> None:  # noqa: B027 - optional, as in the release
        pass

    def get_stats(self) -> Any:
        return None


class StorageBaseV2(StorageBase):
    """0.5.10 adds side pools: one more registration and three calls that raise unless overridden."""

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        if not hasattr(self, "registered_pools"):
            self.registered_pools: dict[Any, Any] = {}
        self.registered_pools[host_pool_name] = host_pool

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        raise NotImplementedError

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        raise NotImplementedError

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        raise NotImplementedError


@dataclass
class StorageMetrics:
    """What get_stats may return; the collector insists on this very class and empties nothing itself."""

    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)
