"""From SGLang's configuration and pools to kvd's namespaces: which pages of which workers are the same thing.

Read once per pool, when it is registered. Every attribute is optional, since older releases have fewer.
"""

from dataclasses import dataclass
from typing import Any

from kvd import wire
from kvd.errors import Unsupported
from kvd.pages import Identity

KV = "kv"
_GEOMETRY = (
    "head_num", "head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim", "index_head_dim",
    "target_layer_num", "num_mamba_layers", "temporal_state_shape", "conv_state_shapes", "size_per_token",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rank:
    """Where this process stands among its worker's ranks."""

    tp: tuple[int, int]  # rank, size
    pp: tuple[int, int]
    cp: tuple[int, int]
    replicated: bool
    nodes: int = 1

    @classmethod
    def of(cls, config: Any, nodes: int = 1) -> "Rank":
        """`nodes`: machines the worker spans. Raises Unsupported for arrangements whose pages kvd would mix up."""

        def pair(name: str) -> tuple[int, int]:
            rank, size = getattr(config, f"{name}_rank", 0), getattr(config, f"{name}_size", 1)
            return int(rank or 0), int(size or 1)

        if int(getattr(config, "dcp_size", 1) or 1) > 1:
            raise Unsupported("decode context parallelism is on", "SGLang supports it with its own backends only")
        return cls(pair("tp"), pair("pp"), pair("attn_cp"), bool(getattr(config, "is_mla_model", False)), nodes)

    def _tp(self, pool: str) -> tuple[int, int]:
        # State-space states are split over the ranks even where KV is replicated.
        return (0, 1) if self.replicated and "mamba" not in pool else self.tp

    def _here(self, pool: str) -> int:
        """How many of the tensor-parallel ranks run on this machine (sglang: server_args.py, nnodes_per_tp_group)."""
        size = self._tp(pool)[1]
        return max(1, size // max(self.nodes // self.pp[1], 1)) if size > 1 else 1

    def shard(self, pool: str) -> tuple[int, int]:
        """(index, count) of this rank's part of a page among this machine's ranks: they share one kvd."""
        rank, here = self._tp(pool)[0], self._here(pool)
        return rank % here * self.cp[1] + self.cp[0], here * self.cp[1]

    def slice(self, pool: str) -> tuple[int, int]:
        """(first rank, all ranks): which part of the heads this machine's shards are."""
        rank, size = self._tp(pool)
        return rank - rank % self._here(pool), size


def namespace_spec(
    pool_name: str, pool: Any, page_bytes: int, access: str, rank: Rank, weights: str, tenant: str, label: str,
    shaping: str = "",
) -> wire.NamespaceSpec:  # fmt: skip
    """What kvd is told about one pool. `access` names the order of a page's bytes: "pieces" or "flat".

    `shaping` tells this pool's pages apart, and leaves the family of pools that they belong to as it is.
    """
    shard, shards = rank.shard(pool_name)
    buffer = getattr(pool, "kv_buffer", None)
    if isinstance(buffer, list | tuple):
        buffer = buffer[0] if buffer else None
    identity = Identity(
        weights=weights + shaping,
        pool=pool_name,
        pool_class=type(pool).__name__,
        layout=_layout(pool, access),
        dtype=str(getattr(pool, "dtype", "")),
        store_dtype=str(getattr(buffer, "dtype", "")),
        page_tokens=int(pool.page_size),
        page_bytes=page_bytes,
        layers=(_int(pool, "layer_num"), _int(pool, "start_layer"), _int(pool, "end_layer")),
        geometry=tuple(number for name in _GEOMETRY for number in _numbers(getattr(pool, name, None))),
        replicated=rank.replicated,
        shards=shards,
        tp_slice=rank.slice(pool_name),
        pipeline=rank.pp,
        tenant=tenant,
    )
    tp_slice = rank.slice(KV)
    family = Identity(
        weights, "", "", "", "", "", 0, 0, (0, 0, 0), (), rank.replicated, 0, tp_slice, rank.pp, tenant=tenant
    )
    return wire.NamespaceSpec(
        identity.namespace(), page_bytes, max(1, int(pool.page_size)), shard, shards, pool_name, label,
        family.namespace(), tenant=tenant,
    )  # fmt: skip


def _layout(pool: Any, access: str) -> str:
    """The order of a page's bytes: SGLang's name of it, and what it adds to that for some."""
    tag, groups = getattr(pool, "storage_format_tag", None), _int(pool, "head_group_num")
    own = f"/{tag}" if tag else ""
    return f"{getattr(pool, 'layout', '')}/{access}{own}" + (f"/{groups} groups" if groups > 1 else "")


def _int(pool: Any, name: str) -> int:
    value = getattr(pool, name, None)
    return value if isinstance(value, int) else -1


def _numbers(value: Any) -> tuple[int, ...]:
    """A shape, a list of shapes or a number, as numbers; -1 where there is nothing."""
    if isinstance(value, bool) or value is None:
        return (-1,)
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list | tuple):
        return (len(value), *(number for item in value for number in _numbers(item)))
    return (-1,)
