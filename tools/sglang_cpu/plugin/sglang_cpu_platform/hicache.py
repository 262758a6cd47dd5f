"""What HiCache lacks on a CPU: unpinned host memory, and the copy functions.

SGLang pins every host pool and staging page without asking the platform, and imports its copy functions only
on CUDA, ROCm and XPU, leaving the names undefined elsewhere. Pinned staging pages fail in a thread: a line
in the log, and every hit of the generic storage path is silently a recompute.
Never does: replace a function SGLang has, or act where torch sees a GPU.
"""

import importlib
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_cpu_platform.kv_copies import MHA_COPIES

HOST_POOL_INIT = "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__"
MHA_POOLS = "sglang.srt.mem_cache.pool_host.mha"


def register() -> None:
    """SGLang calls this once in each of its processes, before it builds anything."""
    if torch.cuda.is_available():
        return
    # A pool remembers this flag, and its generic staging pages (`get_dummy_flat_data_page`) follow it.
    HookRegistry.register(HOST_POOL_INIT, _without_pinning, HookType.BEFORE)
    mha = importlib.import_module(MHA_POOLS)
    for copy in MHA_COPIES:
        if not hasattr(mha, copy.__name__):
            setattr(mha, copy.__name__, copy)


def _without_pinning(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "pin_memory": False}
