"""KV host pools of the three releases on CPU tensors: same attributes, shapes, strides and piece order."""

import torch

from tests.sglang_controller.pool_base import HostKVCache

MHA_LAYOUTS = {
    "0.5.5": ("layer_first", "page_first", "page_first_direct"),
    "0.5.10": ("layer_first", "page_first", "page_first_direct", "page_head"),
    "0.5.23": ("layer_first", "page_first", "page_first_direct", "page_head"),
}
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct")


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
            release=release,
            layout=layout,
            page_size=page_size,
            page_num=page_num,
            dtype=dtype,
            allocator=allocator,
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
        assert self.layout == "page_head"
        assert self.head_num % split_factor == 0
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
            release=release,
            layout=layout,
            page_size=page_size,
            page_num=page_num,
            dtype=dtype,
            allocator=allocator,
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
