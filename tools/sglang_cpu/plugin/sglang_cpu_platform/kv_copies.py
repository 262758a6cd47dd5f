"""KV copies between the device pool and HiCache's host pool, in plain torch, for multi-head attention.

They stand where `sgl_kernel.kvcacheio` stands on a GPU and take its arguments by the names SGLang passes.
The device side is always one tensor `[token, head, dim]` per layer; the host side is K and V, each one of

    layer_first        [layer, token, head, dim]        direct, kernel
    page_first         [token, layer, head, dim]        kernel
    page_first_direct  [page, layer, token, head, dim]  direct
    page_head          [page, head, token, layer, dim]  kernel

"per_layer" loads one layer, host to device, before it runs; "all_layer" backs up all, device to host.
Never does: overlap or reorder anything: a copy is finished when the call returns, on the calling thread.
Always true: the all-layer kernels get raw addresses of live pools, with rows of exactly `item_size` bytes.
"""

import ctypes
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

# io_backend "direct": lists of tensors


def transfer_kv_direct(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """layer_first, both ways."""
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """page_first_direct, load one layer: [K, V] of the host, then [K, V] of this layer on the device."""
    pages = _whole_pages(src_indices, page_size)
    for host, device in zip(src_ptrs, dst_ptrs, strict=True):
        device[dst_indices] = host[pages, layer_id].flatten(0, 1)


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """page_first_direct, back up: `src_ptrs` is every layer's K, then every layer's V."""
    pages = _whole_pages(dst_indices, page_size)
    layers = len(src_ptrs) // len(dst_ptrs)
    for (which, host), layer in product(enumerate(dst_ptrs), range(layers)):
        rows = src_ptrs[which * layers + layer][src_indices]
        host[pages, layer] = rows.unflatten(0, (len(pages), page_size))


# io_backend "kernel": tensors to load, tables of addresses to back up


def transfer_kv_per_layer(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
) -> None:
    """layer_first, load one layer."""
    dst_k[dst_indices] = src_k[src_indices]
    dst_v[dst_indices] = src_v[src_indices]


def transfer_kv_all_layer(
    src_k_layers: Tensor,
    dst_k_layers: Tensor,
    src_v_layers: Tensor,
    dst_v_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    """layer_first, back up: all four tables hold one address per layer."""
    for sources, targets in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            rows = _read_rows(source, src_indices, item_size)
            _view_rows(target, dst_indices, item_size)[dst_indices] = rows


def transfer_kv_per_layer_pf_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    """page_first, load one layer."""
    dst_k[dst_indices] = src_k[src_indices, layer_id]
    dst_v[dst_indices] = src_v[src_indices, layer_id]


def transfer_kv_all_layer_lf_pf(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """page_first, back up."""
    for sources, host in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, source in enumerate(sources.tolist()):
            rows = _read_rows(source, src_indices, item_size)
            host[dst_indices, layer] = rows.view(host.dtype).unflatten(1, host.shape[2:])


def transfer_kv_per_layer_ph_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
    page_size: int,
    head_num: int,
) -> None:
    """page_head, load one layer."""
    page, slot = src_indices // page_size, src_indices % page_size
    dst_k[dst_indices] = src_k[page, :, slot, layer_id]
    dst_v[dst_indices] = src_v[page, :, slot, layer_id]


def transfer_kv_all_layer_lf_ph(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    page_size: int,
    head_num: int,
) -> None:
    """page_head, back up."""
    page, slot = dst_indices // page_size, dst_indices % page_size
    for sources, host in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, source in enumerate(sources.tolist()):
            rows = _read_rows(source, src_indices, item_size)
            host[page, :, slot, layer] = rows.view(host.dtype).unflatten(1, (head_num, -1))


MHA_COPIES: tuple[Callable[..., None], ...] = (
    transfer_kv_direct,
    transfer_kv_per_layer_direct_pf_lf,
    transfer_kv_all_layer_direct_lf_pf,
    transfer_kv_per_layer,
    transfer_kv_all_layer,
    transfer_kv_per_layer_pf_lf,
    transfer_kv_all_layer_lf_pf,
    transfer_kv_per_layer_ph_lf,
    transfer_kv_all_layer_lf_ph,
)


def _whole_pages(indices: Tensor, page_size: int) -> Tensor:
    """Page numbers of token indices that come as whole pages, in order: HiCache allocates nothing else."""
    return indices.view(-1, page_size)[:, 0] // page_size


def _view_rows(address: int, indices: Tensor, row_bytes: int) -> Tensor:
    """The memory at `address` as rows of bytes, up to the highest index; valid as long as the pool lives."""
    rows = int(indices.max()) + 1
    memory = (ctypes.c_uint8 * (rows * row_bytes)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(rows, row_bytes)


def _read_rows(address: int, indices: Tensor, row_bytes: int) -> Tensor:
    return _view_rows(address, indices, row_bytes)[indices]
