"""KV host pools of the three releases on plain CPU tensors: same attributes, shapes, strides and piece order.

Nothing is pinned and no device is involved; `device_pool` is only a bag of numbers. With allocator="shm"
(0.5.23 only) the bytes live on a memfd, as they do when the worker was started with that option.
"""

import math
import mmap
import os
import threading
import uuid
from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import ClassVar

import torch

MHA_LAYOUTS = {
    "0.5.5": ("layer_first", "page_first", "page_first_direct"),
    "0.5.10": ("layer_first", "page_first", "page_first_direct", "page_head"),
    "0.5.23": ("layer_first", "page_first", "page_first_direct", "page_head"),
}
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct")


class HostTensorAllocator:
    """Ordinary private memory: what a release without the shm option always uses."""

    def allocate(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(dims, dtype=dtype)


class ShmHostTensorAllocator(HostTensorAllocator):
    """One memfd per allocate call, whole pages; the tensor begins at offset 0 of its memfd."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.mms: list[mmap.mmap] = []

    @property
    def fd(self) -> int | None:
        return self.fds[0] if self.fds else None

    def allocate(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = -(-math.prod(dims) * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create(f"sglang_host_pool_{uuid.uuid4().hex}", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size, mmap.MAP_SHARED)
        self.fds.append(fd)
        self.mms.append(mapping)
        return torch.frombuffer(mapping, dtype=dtype, count=math.prod(dims)).reshape(dims)

    def __del__(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class SlotPool:
    """Slots handed out from the head of a free list and given back at its tail, as all host pools do."""

    size: int
    page_size: int

    def clear(self) -> None:
        self.free_slots = torch.arange(self.size, dtype=torch.int64)

    def available_size(self) -> int:
        return len(self.free_slots)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        assert need_size % self.page_size == 0, "The requested size should be a multiple of the page size."
        with self.lock:
            if need_size > len(self.free_slots):
                return None
            taken, self.free_slots = self.free_slots[:need_size], self.free_slots[need_size:]
        return taken

    def free(self, indices: torch.Tensor) -> int:
        with self.lock:
            self.free_slots = torch.cat([self.free_slots, indices.cpu()])
        return len(indices)

    @property
    def lock(self) -> threading.RLock:
        lock: threading.RLock = self.__dict__.setdefault("_lock", threading.RLock())
        return lock


class HostKVCache(SlotPool, ABC):
    """What every KV host pool of the release has. `size` is in token slots; page n starts at slot n*page_size."""

    storage_format_tag: ClassVar[str | None] = None
    layer_num: int
    token_bytes_per_layer: int  # one token, one layer, one piece (K alone, V alone, or the latent)

    def __init__(
        self, *, release: str, layout: str, page_size: int, page_num: int, dtype: torch.dtype, allocator: str
    ) -> None:
        self.release = release
        self.layout = layout
        self.page_size = page_size
        self.page_num = page_num
        self.size = page_num * page_size
        self.dtype = dtype
        self.device = "cpu"
        self.pin_memory = False
        self.start_layer = 0
        self.end_layer = self.layer_num
        self.size_per_token = self.get_size_per_token()
        if allocator == "shm" and release != "0.5.23":
            raise ValueError(f"SGLang {release} has no shm host allocator")
        if release != "0.5.5":
            self.allocator = ShmHostTensorAllocator() if allocator == "shm" else HostTensorAllocator()
        if release != "0.5.23":
            self.device_pool = SimpleNamespace(
                size=self.size // 2, store_dtype=dtype, dtype=dtype, device="cuda", layer_num=self.layer_num,
                start_layer=0, end_layer=self.layer_num,
            )
        self.kv_buffer = self._allocate(self._dims())
        if release == "0.5.23":
            self.fd = getattr(self.allocator, "fd", None)
            self.dcp_size, self.dcp_rank = 1, 0
            self.logical_size, self.logical_page_size = self.size, self.page_size
            self.device_capacity_tokens = self.size // 2
            self.target_layer_num = self.layer_num
            self.can_use_write_back_jit = False
            self.pool_label = "kv"
        self.token_stride_size = self.token_bytes_per_layer
        self.layout_dim = self.token_stride_size * self.layer_num
        self.clear()

    def _allocate(self, dims: tuple[int, ...]) -> torch.Tensor:
        allocator = self.allocator if self.release != "0.5.5" else HostTensorAllocator()
        return allocator.allocate(dims, self.dtype)

    @abstractmethod
    def _dims(self) -> tuple[int, ...]: ...

    @abstractmethod
    def get_size_per_token(self) -> int: ...

    @abstractmethod
    def _page(self, index: int) -> torch.Tensor:
        """The page that starts at slot `index`, as a view in the pool's own axis order."""

    def get_data_page(self, index: int | torch.Tensor, flat: bool = True) -> torch.Tensor:
        """The page's values; a *view* of host memory where the page is one run (MLA, page-first layouts)."""
        page = self._page(int(index))
        return page.flatten() if flat else page

    def set_from_flat_data_page(self, index: int | torch.Tensor, data_page: torch.Tensor) -> None:
        page = self._page(int(index))
        page.copy_(data_page.reshape(page.shape))


class MHATokenToKVPoolHost(HostKVCache):
    """K and V in one buffer, all of K first."""

    def __init__(
        self,
        *,
        release: str = "0.5.23",
        layout: str = "page_first",
        page_size: int = 4,
        page_num: int = 64,
        layer_num: int = 3,
        head_num: int = 2,
        head_dim: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        allocator: str = "default",
    ) -> None:
        if layout not in MHA_LAYOUTS[release]:
            raise ValueError(f"Unsupported layout: {layout}")
        self.layer_num, self.head_num, self.head_dim = layer_num, head_num, head_dim
        self.dtype = dtype
        self.token_bytes_per_layer = head_num * head_dim * dtype.itemsize
        if release == "0.5.23":
            self.v_head_dim = head_dim
        super().__init__(
            release=release, layout=layout, page_size=page_size, page_num=page_num, dtype=dtype, allocator=allocator
        )
        if release != "0.5.23":
            self.device_pool.head_num, self.device_pool.head_dim = head_num, head_dim

    def get_size_per_token(self) -> int:
        return 2 * self.layer_num * self.token_bytes_per_layer

    def get_ksize_per_token(self) -> int:
        return self.get_size_per_token() // 2

    @property
    def k_buffer(self) -> torch.Tensor:
        return self.kv_buffer[0]

    @property
    def v_buffer(self) -> torch.Tensor:
        return self.kv_buffer[1]

    def _dims(self) -> tuple[int, ...]:
        layers, heads, dim = self.layer_num, self.head_num, self.head_dim
        return {
            "layer_first": (2, layers, self.size, heads, dim),
            "page_first": (2, self.size, layers, heads, dim),
            "page_first_direct": (2, self.page_num, layers, self.page_size, heads, dim),
            "page_head": (2, self.page_num, heads, self.page_size, layers, dim),
        }[self.layout]

    def _page(self, index: int) -> torch.Tensor:
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, index : index + self.page_size]
        if self.layout == "page_first":
            return self.kv_buffer[:, index : index + self.page_size]
        number = index // self.page_size
        return self.kv_buffer[:, number : number + 1]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        dims = (2, self.layer_num, self.page_size, self.head_num, self.head_dim)
        return torch.zeros(dims, dtype=self.dtype).flatten()

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Pointers and sizes, K then V of each piece: 2 a page, or 2 a layer and page for layer_first."""
        assert len(indices) % self.page_size == 0
        base, v_offset = self.kv_buffer.data_ptr(), self.kv_buffer[0].numel() * self.dtype.itemsize
        starts = indices.tolist()[:: self.page_size]
        if self.layout == "layer_first":
            layer_bytes = self.size * self.token_bytes_per_layer
            ks = [
                base + start * self.token_bytes_per_layer + layer * layer_bytes
                for start in starts
                for layer in range(self.layer_num)
            ]
            piece = self.page_size * self.token_bytes_per_layer
        else:
            ks = [base + start * self.layout_dim for start in starts]
            piece = self.page_size * self.layout_dim
        pointers = [pointer for k in ks for pointer in (k, k + v_offset)]
        return pointers, [piece] * len(pointers)

    def get_split_heads_page_buffer_meta(
        self, indices: torch.Tensor, split_factor: int
    ) -> tuple[list[int], list[int]]:
        """Only for page_head, and only since 0.5.10: each page cut into `split_factor` groups of heads."""
        if self.release == "0.5.5":
            raise AttributeError("get_split_heads_page_buffer_meta")
        assert self.layout == "page_head" and self.head_num % split_factor == 0
        whole, sizes = self.get_page_buffer_meta(indices)
        part = sizes[0] // split_factor if sizes else 0
        pointers = [
            whole[pair + side] + group * part
            for pair in range(0, len(whole), 2)
            for group in range(split_factor)
            for side in (0, 1)
        ]
        return pointers, [part] * len(pointers)


class MLATokenToKVPoolHost(HostKVCache):
    """One latent per token and layer; the same bytes on every tensor-parallel rank."""

    def __init__(
        self,
        *,
        release: str = "0.5.23",
        layout: str = "page_first",
        page_size: int = 4,
        page_num: int = 64,
        layer_num: int = 3,
        kv_lora_rank: int = 16,
        qk_rope_head_dim: int = 4,
        dtype: torch.dtype = torch.bfloat16,
        allocator: str = "default",
    ) -> None:
        if layout not in MLA_LAYOUTS:
            raise ValueError(f"Unsupported layout: {layout}")
        self.layer_num, self.kv_lora_rank, self.qk_rope_head_dim = layer_num, kv_lora_rank, qk_rope_head_dim
        self.dtype = dtype
        self._row = kv_lora_rank + qk_rope_head_dim
        self.token_bytes_per_layer = self._row * dtype.itemsize
        if release != "0.5.5":
            self.kv_cache_dim = self._row
        super().__init__(
            release=release, layout=layout, page_size=page_size, page_num=page_num, dtype=dtype, allocator=allocator
        )

    def get_size_per_token(self) -> int:
        return self.layer_num * self.token_bytes_per_layer

    def get_ksize_per_token(self) -> int:
        return self.get_size_per_token()

    def _dims(self) -> tuple[int, ...]:
        return {
            "layer_first": (self.layer_num, self.size, 1, self._row),
            "page_first": (self.size, self.layer_num, 1, self._row),
            "page_first_direct": (self.page_num, self.layer_num, self.page_size, 1, self._row),
        }[self.layout]

    def _page(self, index: int) -> torch.Tensor:
        if self.layout == "layer_first":
            return self.kv_buffer[:, index : index + self.page_size]
        if self.layout == "page_first":
            return self.kv_buffer[index : index + self.page_size]
        number = index // self.page_size
        return self.kv_buffer[number : number + 1]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros((self.layer_num, self.page_size, 1, self._row), dtype=self.dtype).flatten()

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """One pointer a page, or one a layer and page for layer_first."""
        assert len(indices) % self.page_size == 0
        base, starts = self.kv_buffer.data_ptr(), indices.tolist()[:: self.page_size]
        if self.layout == "layer_first":
            layer_bytes = self.size * self.token_bytes_per_layer
            pointers = [
                base + start * self.token_bytes_per_layer + layer * layer_bytes
                for start in starts
                for layer in range(self.layer_num)
            ]
            return pointers, [self.page_size * self.token_bytes_per_layer] * len(pointers)
        pointers = [base + start * self.layout_dim for start in starts]
        return pointers, [self.page_size * self.layout_dim] * len(pointers)
