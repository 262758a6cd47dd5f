"""Our side of the benchmarks: a real daemon, real plugins with faithful host pools, and ways to start from nothing."""

import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kvd import wire
from kvd.errors import KvdError
from kvd.sidecar.hicache import KvdStorage
from kvd.sidecar.memory import map_pages
from tests.harness import Daemon, eventually
from tests.sglang_controller.pools import MHATokenToKVPoolHost, MLATokenToKVPoolHost, page_slots
from tools.bench._table import MIB


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """A folder for one run, gone after it."""
    with tempfile.TemporaryDirectory(prefix="kvd-bench-", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def running_daemon(folder: Path, arena_mib: int, extent_mib: int = 64) -> Iterator[Daemon]:
    """A daemon whose arena is faulted in."""
    daemon = Daemon(folder, arena_mib=arena_mib, extent_mib=extent_mib)

    def faulted() -> bool:
        try:
            return daemon.status().tiers[0].prefaulted_bytes >= arena_mib * MIB
        except KvdError:  # busy
            return False

    try:
        daemon.start()
        eventually(faulted, 120, "the arena is faulted in")
        yield daemon
    finally:
        daemon.stop()


def mha_pool(tokens: int, layers: int, heads: int, pages: int) -> MHATokenToKVPoolHost:
    """A page_first pool of bfloat16 K and V with heads of 128, every byte written."""
    pool = MHATokenToKVPoolHost(page_size=tokens, page_num=pages, layer_num=layers, head_num=heads, head_dim=128)
    return _filled(pool)


def mla_pool(tokens: int, layers: int, pages: int) -> MLATokenToKVPoolHost:
    """A page_first pool of latents, 512 + 64 values of bfloat16 per token and layer, every byte written."""
    pool = MLATokenToKVPoolHost(
        page_size=tokens, page_num=pages, layer_num=layers, kv_lora_rank=512, qk_rope_head_dim=64
    )
    return _filled(pool)


def _filled(pool: Any) -> Any:
    flat = pool.kv_buffer.view(torch.uint8).flatten()
    flat.copy_((torch.arange(flat.numel(), dtype=torch.int32) % 251).to(torch.uint8))
    return pool


def page_bytes(pool: Any) -> int:
    return int(pool.size_per_token) * int(pool.page_size)


def attach(
    daemon: Daemon, pool: Any, mla: bool = False, warm: bool = True, settings: Mapping[str, int] | None = None
) -> KvdStorage:
    """A plugin as SGLang makes it, ready for calls; its mapping of the arena is warm unless told otherwise."""
    config = SimpleNamespace(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=mla,
        is_page_first_layout=True, model_name="bench", enable_storage_metrics=False,
        extra_config={
            "interface_v1": 1, "kvd": {"socket": str(daemon.socket), "weights_id": "bench", **(settings or {})},
        },
    )  # fmt: skip
    plugin = KvdStorage(config, {})
    plugin.register_mem_pool_host(pool)
    assert plugin._shelves is not None
    session = plugin._shelves.session

    def ready() -> bool:
        assert not session.circuit.off, session.circuit.off
        attachment = session.attachment
        return attachment is not None and attachment.joined > 0 and session.circuit.closed

    eventually(ready, 20, "the plugin is attached")
    if warm:  # what the plugin's own thread does in steps, done at once
        assert session.attachment is not None
        arena = session.attachment.arena
        assert map_pages(arena, 0, arena.nbytes & ~4095), "cannot map the arena"
    return plugin


def fresh_keys(count: int) -> list[str]:
    """Page keys that nobody has."""
    return [secrets.token_hex(32) for _ in range(count)]


def slots(pool: Any, pages: Sequence[int]) -> torch.Tensor:
    return page_slots(pool, list(pages))


def empty(daemon: Daemon) -> None:
    """Take every page out of a running daemon.

    There is no message for that. This is `kvdctl verify`'s, with every page reported as damaged: each is withdrawn
    and its slot goes to the end of the line.
    """
    link = daemon.tool()
    try:
        cursor = 0
        while cursor >= 0:
            found = link.ask(wire.Scan(cursor, 256), wire.Scanned, 10.0)
            if found.lease:
                link.send(wire.EndScan(found.lease, list(range(256))))
            cursor = found.next
        eventually(lambda: link.ask(wire.GetStatus(), wire.Status, 5.0).tiers[0].pages == 0, 10, "the arena is empty")
    finally:
        link.close()
