"""Fake host pools, and the helpers that fill, read and compare their pages.

A page is compared as the bytes `get_data_page` yields, whatever the layout: what was stored from one pool
must read back as the same bytes into any pool of the same shape and layout.
"""

from typing import Any

import torch

from tests.sglang_controller.pool_base import HostKVCache
from tests.sglang_controller.pool_kv import (
    MHA_LAYOUTS,
    MLA_LAYOUTS,
    MHATokenToKVPoolHost,
    MLATokenToKVPoolHost,
)
from tests.sglang_controller.pool_side import HostPoolGroup, LogicalHostPool, MambaPoolHost, PoolEntry

__all__ = [
    "MHA_LAYOUTS",
    "MLA_LAYOUTS",
    "HostKVCache",
    "HostPoolGroup",
    "LogicalHostPool",
    "MHATokenToKVPoolHost",
    "MLATokenToKVPoolHost",
    "MambaPoolHost",
    "PoolEntry",
    "fill_pages",
    "page_slots",
    "read_page",
    "same_pages",
    "wipe_pages",
]


def page_slots(pool: Any, pages: list[int]) -> torch.Tensor:
    """`host_indices` for these page numbers: int64 on the CPU, page_size consecutive slots a page."""
    starts = torch.tensor(pages, dtype=torch.int64).reshape(-1, 1) * pool.page_size
    slots: torch.Tensor = (starts + torch.arange(pool.page_size, dtype=torch.int64)).flatten()
    return slots


def read_page(pool: Any, page: int) -> bytes:
    """The page's bytes as the generic path would hand them to a plugin, copied."""
    data: torch.Tensor = pool.get_data_page(page * pool.page_size)
    return data.contiguous().view(torch.uint8).numpy().tobytes()


def fill_pages(pool: Any, pages: list[int], seed: int = 0) -> list[bytes]:
    """Write different random bytes into each page; returns them, so a test can compare after a round trip."""
    random = torch.Generator().manual_seed(seed)
    for page in pages:
        flat = pool.get_dummy_flat_data_page()
        size = flat.numel() * flat.element_size()
        data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=random)
        pool.set_from_flat_data_page(page * pool.page_size, data.view(flat.dtype))
    return [read_page(pool, page) for page in pages]


def wipe_pages(pool: Any, pages: list[int]) -> None:
    """Zero these pages, so that a get which copies nothing cannot look right."""
    for page in pages:
        pool.set_from_flat_data_page(page * pool.page_size, torch.zeros_like(pool.get_dummy_flat_data_page()))


def same_pages(pool: Any, pages: list[int], expected: list[bytes]) -> bool:
    """Whether each page holds exactly the expected bytes."""
    return [read_page(pool, page) for page in pages] == expected
