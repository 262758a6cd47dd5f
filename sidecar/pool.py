"""A host pool as runs of bytes: where the pieces of page n lie in this process's memory.

The geometry is learnt from the pool's own answers (`get_page_buffer_meta`), not assumed from the name of its
layout: asked for its first, second and last page, every layout so far answers with pieces that move by a fixed
stride per page. A pool that does not is asked anew for every page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvd.errors import Unsupported
from kvd.sidecar.memory import bytes_at

Bytes = npt.NDArray[np.uint8]


class PageSource(Protocol):
    """Where pages come from or go to, in one worker."""

    def pieces(self, page: int) -> list[Bytes]:
        """The page's bytes in order, each piece contiguous and writable."""
        ...


@dataclass(slots=True)
class PoolView:
    """The pages of one host pool. Keeps the pool alive."""

    pool: Any
    page_tokens: int
    page_bytes: int
    _memory: Bytes | None
    _offsets: list[int]
    _sizes: list[int]
    _strides: list[int]

    def pieces(self, page: int) -> list[Bytes]:
        memory = self._memory
        if memory is None:
            return [bytes_at(address, size) for address, size in _meta(self.pool, self.page_tokens, page)]
        return [
            memory[offset + page * stride : offset + page * stride + size]
            for offset, stride, size in zip(self._offsets, self._strides, self._sizes, strict=True)
        ]

    def pages_of(self, host_indices: Any, count: int) -> list[int]:
        """Page numbers of `count` pages given by their token slots. Raises ValueError where they do not fit."""
        if host_indices is None or len(host_indices) != count * self.page_tokens:
            raise ValueError(f"{count} pages of {self.page_tokens} tokens need as many slots")
        starts = host_indices[:: self.page_tokens].tolist()
        if any(start % self.page_tokens for start in starts):
            raise ValueError("host slots are not page-aligned")
        return [start // self.page_tokens for start in starts]


def view_pool(pool: Any) -> PoolView:
    """Learn a pool's geometry. Raises Unsupported when it cannot say where its pages are."""
    if not hasattr(pool, "get_page_buffer_meta"):
        raise Unsupported(
            f"{type(pool).__name__} has no get_page_buffer_meta", 'leave "interface_v1" out of the extra config'
        )
    tokens = int(pool.page_size)
    pages = int(pool.size) // tokens
    if pages < 1:
        raise Unsupported(f"{type(pool).__name__} holds no page", "give the host pool more memory")
    first = _meta(pool, tokens, 0)
    sizes = [size for _, size in first]
    last = pages - 1
    strides = [0] * len(first)
    regular = True
    if last > 0:
        strides = [b - a for (a, _), (b, _) in zip(first, _meta(pool, tokens, 1), strict=True)]
        ends = _meta(pool, tokens, last)
        regular = [size for _, size in ends] == sizes and all(
            end == start + last * stride for (start, _), (end, _), stride in zip(first, ends, strides, strict=True)
        )
    regular = regular and min(strides) >= 0
    if not regular:
        return PoolView(pool, tokens, sum(sizes), None, [], [], [])
    base = min(start for start, _ in first)
    top = max(start + last * stride + size for (start, size), stride in zip(first, strides, strict=True))
    memory = bytes_at(base, top - base)
    return PoolView(pool, tokens, sum(sizes), memory, [start - base for start, _ in first], sizes, strides)


def _meta(pool: Any, tokens: int, page: int) -> Sequence[tuple[int, int]]:
    import torch

    indices = torch.arange(page * tokens, (page + 1) * tokens, dtype=torch.int64)
    addresses, sizes = pool.get_page_buffer_meta(indices)
    return [(int(a), int(s)) for a, s in zip(addresses, sizes, strict=True)]


@dataclass(slots=True)
class FlatPages:
    """Pages given as flat tensors: what SGLang hands over on its generic path."""

    tensors: list[Any]

    def pieces(self, page: int) -> list[Bytes]:
        import torch

        tensor = self.tensors[page]
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("a page tensor must be contiguous and on the host")
        return [tensor.reshape(-1).view(torch.uint8).numpy()]
