"""The host pools beside KV: per-request state (Mamba), the tensorless anchor, and the group that holds all.

These differ from a KV pool exactly where a plugin is tempted to assume: page size 1, several buffers of
several dtypes, no `fd`, no `kv_buffer`, and in 0.5.10 no `get_page_buffer_meta` either.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch

from tests.sglang_controller.pool_base import HostTensorAllocator, ShmHostTensorAllocator, SlotPool

_MAMBA_LAYOUTS = {
    "0.5.10": ("layer_first", "page_first", "page_first_direct"),
    "0.5.23": ("page_first", "page_first_direct"),
}


class MambaPoolHost(SlotPool):
    """One slot is one page is one request's whole state: a temporal tensor and some conv tensors.

    It has no layer_num, start_layer or fd. 0.5.23 puts the buffers in `kv_buffer` (a list); 0.5.10 has no
    such attribute. With the shm allocator each buffer is its own memfd, in `allocator.fds` order.
    """

    def __init__(
        self,
        *,
        release: str = "0.5.23",
        layout: str = "page_first",
        size: int = 16,
        num_mamba_layers: int = 2,
        temporal_shape: tuple[int, ...] = (3, 4),
        conv_shapes: tuple[tuple[int, ...], ...] = ((5,), (2, 2)),
        temporal_dtype: torch.dtype = torch.float32,
        conv_dtype: torch.dtype = torch.bfloat16,
        allocator: str = "default",
    ) -> None:
        if layout not in _MAMBA_LAYOUTS.get(release, ()):
            raise ValueError(f"SGLang {release} has no Mamba host pool with layout {layout}")
        self.release, self.layout = release, layout
        self.page_size, self.page_num, self.size = 1, size, size
        self.device, self.pin_memory = "cpu", False
        self.num_mamba_layers = num_mamba_layers
        self.temporal_state_shape, self.conv_state_shapes = temporal_shape, list(conv_shapes)
        self.temporal_dtype, self.conv_dtype, self.dtype = temporal_dtype, conv_dtype, conv_dtype
        self.allocator = ShmHostTensorAllocator() if allocator == "shm" else HostTensorAllocator()
        self.size_per_token = self.get_size_per_token()
        self.temporal_buffer = self._buffer(temporal_shape, temporal_dtype)
        self.conv_buffer = [self._buffer(shape, conv_dtype) for shape in conv_shapes]
        if release == "0.5.23":
            self.kv_buffer = [self.temporal_buffer, *self.conv_buffer]
            self.device_pool = None
            self.slot_state_buffers: list[torch.Tensor] = []
            self.can_use_write_back_jit = True
        else:
            self.device_pool = SimpleNamespace(size=size // 2, num_mamba_layers=num_mamba_layers, device="cuda")
        self.clear()

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.layout == "layer_first":
            return self.allocator.allocate((self.num_mamba_layers, self.size, *shape), dtype)
        return self.allocator.allocate((self.size, self.num_mamba_layers, 1, *shape), dtype)

    def get_size_per_token(self) -> int:
        conv = sum(math.prod(shape) * self.conv_dtype.itemsize for shape in self.conv_state_shapes)
        temporal = math.prod(self.temporal_state_shape) * self.temporal_dtype.itemsize
        return (conv + temporal) * self.num_mamba_layers

    def get_ksize_per_token(self) -> int:
        return self.get_size_per_token()

    def get_hybrid_pool_buffer(self) -> list[torch.Tensor]:
        if self.release != "0.5.23":
            raise AttributeError("get_hybrid_pool_buffer")
        return [self.temporal_buffer, *self.conv_buffer]

    def _parts(self, index: int) -> Iterator[torch.Tensor]:
        for buffer in (self.temporal_buffer, *self.conv_buffer):
            yield buffer[:, index : index + 1] if self.layout == "layer_first" else buffer[index]

    def get_data_page(self, index: int | torch.Tensor, flat: bool = True) -> torch.Tensor:
        """Raw bytes, temporal first; always a copy."""
        return torch.cat([part.contiguous().view(torch.uint8).reshape(-1) for part in self._parts(int(index))])

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(self.page_size * self.size_per_token, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int | torch.Tensor, data_page: torch.Tensor) -> None:
        flat, start = data_page.contiguous().view(torch.uint8).reshape(-1), 0
        for part in self._parts(int(index)):
            size = part.numel() * part.element_size()
            part.copy_(flat[start : start + size].clone().view(part.dtype).reshape(part.shape))
            start += size

    def __getattr__(self, name: str) -> Any:
        # 0.5.10 has no get_page_buffer_meta at all, and plugins probe with hasattr.
        if name == "get_page_buffer_meta" and self.__dict__.get("release") == "0.5.23":
            return self._page_buffer_meta
        raise AttributeError(name)

    def _page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        buffers = [self.temporal_buffer, *self.conv_buffer]
        sizes = [buffer[0].numel() * buffer.element_size() for buffer in buffers]
        pointers = [
            buffer.data_ptr() + slot * size
            for slot in indices.tolist()
            for buffer, size in zip(buffers, sizes, strict=True)
        ]
        return pointers, sizes * len(indices)


class LogicalHostPool(SlotPool):
    """An anchor that numbers pages and holds no bytes (0.5.23, DeepSeek-V4): side pools have them all."""

    def __init__(self, *, page_size: int = 4, page_num: int = 64, layout: str = "layer_first") -> None:
        self.release, self.layout = "0.5.23", layout
        self.page_size, self.size = page_size, page_num * page_size
        self.logical_size, self.device, self.dtype = self.size, "cpu", torch.uint8
        self.layer_num = self.start_layer = self.end_layer = self.size_per_token = 0
        self.kv_buffer: None = None
        self.allocator: None = None
        self.can_use_write_back_jit = True
        self.storage_format_tag: str | None = None
        self.clear()

    def get_data_page(self, index: int | torch.Tensor, flat: bool = True) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int | torch.Tensor, data_page: torch.Tensor) -> None:
        return None

    def get_page_buffer_meta(self, indices: torch.Tensor) -> None:
        return None

    def get_ksize_per_token(self) -> int:
        return 0


@dataclass
class PoolEntry:
    """A pool and its name inside a group."""

    name: Enum
    host_pool: Any
    device_pool: Any = None
    is_primary_index_anchor: bool = False


class HostPoolGroup:
    """The pools of a hybrid model. 0.5.10 registers *this* as the plugin's host pool; 0.5.23 its anchor.

    A 0.5.10 group has no kv_buffer, dtype, size_per_token, page_num or get_page_buffer_meta.
    """

    def __init__(self, entries: list[PoolEntry]) -> None:
        self.entries = entries
        self.entry_map = {entry.name: entry for entry in entries}
        self.anchor_entry = next((e for e in entries if e.is_primary_index_anchor), entries[0])
        anchor = self.anchor_entry.host_pool
        self.layout, self.page_size = anchor.layout, anchor.page_size
        self.device, self.size = anchor.device, anchor.size

    def alloc(self, need_size: int) -> torch.Tensor | None:
        taken: torch.Tensor | None = self.anchor_entry.host_pool.alloc(need_size)
        return taken

    def free(self, indices: torch.Tensor) -> int:
        return int(self.anchor_entry.host_pool.free(indices))

    def get_data_page(self, index: int | torch.Tensor, flat: bool = True) -> torch.Tensor:
        page: torch.Tensor = self.anchor_entry.host_pool.get_data_page(index, flat)
        return page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        page: torch.Tensor = self.anchor_entry.host_pool.get_dummy_flat_data_page()
        return page

    def set_from_flat_data_page(self, index: int | torch.Tensor, data_page: torch.Tensor) -> None:
        self.anchor_entry.host_pool.set_from_flat_data_page(index, data_page)
