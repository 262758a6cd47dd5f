"""The smallest right plugin: a dict. The self-test's good example, and the base of its bad ones."""

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from tests.sglang_controller import keys as page_chain
from tests.sglang_controller.controller import Controller

Start = Callable[..., Controller]
"""What the `start` fixture is: (version, pool, base class, **controller options) -> attached controller."""


def _policy(transfer: Any) -> str:
    return str(getattr(transfer.hit_policy, "value", transfer.hit_policy))


def _leading(flags: list[bool]) -> int:
    return flags.index(False) if False in flags else len(flags)


class DictStorage:
    """Pages by (pool, key, shard). One subclass per test, so that `store` is its own."""

    store: ClassVar[dict[tuple[str, str, int], bytes]]

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        self.config = storage_config
        self.shard = 0 if storage_config.is_mla_model else storage_config.tp_rank
        self.pools: dict[str, Any] = {}
        self.closed = False

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        anchor = getattr(mem_pool_host, "anchor_entry", None)
        self.pools["kv"] = anchor.host_pool if anchor else mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        self.pools[host_pool_name.value] = host_pool

    def on_host_pools_registered(self) -> None:
        assert "kv" in self.pools

    # --- one page of one pool

    def _where(self, pool: str, key: str) -> tuple[str, str, int]:
        return pool, key, self.config.tp_rank if pool == "mamba" else self.shard

    def _has(self, pool: str, key: str) -> bool:
        if pool == "kv" and self.pools["kv"].kv_buffer is None:
            return True
        return self._where(pool, key) in self.store

    def _pieces(self, pool: str, slots: torch.Tensor) -> list[tuple[int, int]] | None:
        meta = getattr(self.pools[pool], "get_page_buffer_meta", None)
        pieces = meta(slots) if meta else None
        return list(zip(*pieces, strict=True)) if pieces else None

    def _save(self, pool: str, key: str, slots: torch.Tensor) -> bool:
        pieces = self._pieces(pool, slots)
        if pieces is None:
            data = self.pools[pool].get_data_page(int(slots[0])).contiguous().view(torch.uint8)
            self.store[self._where(pool, key)] = data.numpy().tobytes()
        else:
            self.store[self._where(pool, key)] = b"".join(ctypes.string_at(*piece) for piece in pieces)
        return True

    def _load(self, pool: str, key: str, slots: torch.Tensor) -> bool:
        if not self._has(pool, key):
            return False
        data = self.store.get(self._where(pool, key), b"")
        pieces = self._pieces(pool, slots)
        if pieces is None:
            if data:
                flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                self.pools[pool].set_from_flat_data_page(int(slots[0]), flat)
            return True
        for pointer, size in pieces:
            ctypes.memmove(pointer, data[:size], size)
            data = data[size:]
        return not data

    # --- the calls

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return _leading([self._has("kv", key) for key in keys])

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        kv = self.batch_exists(keys)
        lengths, hits = set(range(1, kv + 1)), {"kv": kv}
        for transfer in pool_transfers or []:
            has = [self._has(transfer.name.value, key) for key in keys[:kv]]
            if _policy(transfer) == "all_pages":
                allowed = set(range(1, _leading(has) + 1))
            else:
                window = max(1, len(transfer.keys or ()))
                allowed = {n for n in range(1, kv + 1) if all(has[max(0, n - window) : n])}
            hits[transfer.name.value] = max(allowed, default=0)
            lengths &= allowed
        result = self.result_class(max(lengths, default=0), hits)
        if hasattr(result, "restorable_prefix_pages"):
            result.restorable_prefix_pages = sorted(lengths)
        return result

    result_class: ClassVar[type[Any]]

    def _each(self, pool: str, keys: list[str], slots: torch.Tensor, step: Any) -> list[bool]:
        size = self.pools[pool].page_size
        return [step(pool, key, slots[i * size : (i + 1) * size]) for i, key in enumerate(keys)]

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._each("kv", keys, host_indices, self._load)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._each("kv", keys, host_indices, self._save)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        return {t.name: self._each(t.name.value, t.keys, t.host_indices, self._load) for t in transfers}

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        return {t.name: self._each(t.name.value, t.keys, t.host_indices, self._save) for t in transfers}

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        found = []
        for key, target in zip(keys, target_locations, strict=True):
            data = self.store.get(self._where("kv", key))
            if data is not None:
                target.view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            found.append(target if data is not None else None)
        return found

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        for key, value in zip(keys, values, strict=True):
            self.store[self._where("kv", key)] = value.contiguous().view(torch.uint8).numpy().tobytes()
        return True

    def clear(self) -> None:
        self.store.clear()

    def get_stats(self) -> Any:
        return None

    def close(self) -> None:
        self.closed = True


def dict_backend(release: Any, base: type[Any] = DictStorage) -> type[Any]:
    """A fresh class with its own empty store, answering with this release's PoolTransferResult."""
    result = getattr(release.stub, "PoolTransferResult", None)
    return type("FreshDictStorage", (base,), {"store": {}, "result_class": result})


def chain(pages: int, pool: Any, seed: int = 0) -> list[str]:
    return page_chain.page_keys(list(range(seed, seed + pages * pool.page_size)), pool.page_size)
