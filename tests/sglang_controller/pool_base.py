"""What every host pool stands on: its memory, its free slots, and the attributes its release gives it.

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
    """What every KV host pool of the release has. `size` is in slots; page n starts at slot n*page_size."""

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
                size=self.size // 2,
                store_dtype=dtype,
                dtype=dtype,
                device="cuda",
                layer_num=self.layer_num,
                start_layer=0,
                end_layer=self.layer_num,
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
