"""What the SGLang around us offers and says about itself, found by probing; no release numbers are compared.

Everything is optional: this module imports without SGLang, and with releases as old as 0.5.3.
"""

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable
from typing import Any

from kvd.errors import Unsupported
from kvd.sglang_info import server_name
from kvd.sidecar import shaping, weightwatch
from kvd.sidecar.weights import fingerprint, folder


def probe(*places: str) -> Any:
    """The first of these "module:name" that exists, or None."""
    for place in places:
        module, name = place.split(":")
        try:
            return getattr(importlib.import_module(module), name)
        except Exception:  # an old module may fail to import in any way: then this place has it not
            continue
    return None


class _NoStorage:
    """Stands in for HiCacheStorage where SGLang is not installed."""


StorageBase: type = probe("sglang.srt.mem_cache.hicache_storage:HiCacheStorage") or _NoStorage
PoolTransferResult: Callable[..., Any] | None = probe("sglang.srt.mem_cache.hicache_storage:PoolTransferResult")


def new_metrics() -> Any:
    """An empty StorageMetrics, or None where the release has none."""
    kind = probe(
        "sglang.srt.observability.metrics_collector:StorageMetrics", "sglang.srt.metrics.collector:StorageMetrics"
    )
    return None if kind is None else kind()


def server_args() -> Any:
    """SGLang's launch arguments as this process has them, or None."""
    for place in (
        "sglang.srt.runtime_context:get_server_args",
        "sglang.srt.server_args:get_global_server_args",
        "sglang.srt.managers.schedule_batch:get_global_server_args",
    ):
        getter = probe(place)
        try:
            found = getter() if getter is not None else None
        except Exception:  # retired accessors raise
            continue
        if found is not None:
            return found
    return None


def nodes() -> int:
    """How many machines this worker's ranks are spread over."""
    return int(getattr(server_args(), "nnodes", 1) or 1)


def honours_interface_v1() -> bool:
    """Does this release's controller know "interface_v1"? Without the controller at hand: yes."""
    controller = probe("sglang.srt.managers.cache_controller:HiCacheController")
    if controller is None:
        return True
    try:
        return "interface_v1" in inspect.getsource(importlib.import_module(controller.__module__))
    except (OSError, TypeError):
        return True


def keys_name_adapters() -> bool:
    """Do this release's page keys differ between LoRA adapters and salts? (Seeded chains, sglang 0.5.23.)"""
    if probe("sglang.srt.mem_cache.hicache_storage:HiCacheStorage") is None:
        return True
    return probe("sglang.srt.mem_cache.utils:storage_namespace_seed") is not None


_serving: Any = probe("sglang.srt.runtime_context:get_serving")
_device: Any = probe("sglang.srt.runtime_context:get_device")


def server() -> str:
    """Which server this rank is of, as kvd.sglang_info names it; "" where that is not known.

    The arguments as this process has them may lack what SGLang chose itself, so its resolved settings go first.
    """
    try:
        if _serving is not None and _device is not None:
            return server_name(_serving().port, _device().random_seed)
    except Exception:  # not published in this process
        pass
    arguments = server_args()
    return server_name(getattr(arguments, "port", None), getattr(arguments, "random_seed", None))


def weight_version() -> str:
    """A name for the weights in memory: another one after every online update that SGLang lets us see."""
    try:
        named = str(_serving().weight_version) if _serving is not None else ""
    except Exception:  # not published in this process
        named = ""
    return f"{named}/{weightwatch.epoch()}"


def weights_change() -> bool:
    """Whether they are being updated just now."""
    return weightwatch.running()


def weights_identity(model_path: str, weights_id: str) -> str:
    """Names the weights, and what the launch settings make of them. Raises Unsupported when that is not certain.

    `weights_id` is the operator's word for what is in the files, and for nothing else.
    """
    arguments = server_args()
    if (
        getattr(arguments, "enable_lora", None) or getattr(arguments, "lora_paths", None)
    ) and not keys_name_adapters():
        raise Unsupported(
            "LoRA is on, and this SGLang's page keys do not tell adapters apart",
            "upgrade SGLang, or serve without LoRA",
        )
    weights = weights_id or _loaded(arguments, model_path)
    return weights + shaping.everywhere(arguments, os.environ, by_path=bool(weights_id))


def pool_shaping(name: str, pool: Any, weights_id: str) -> str:
    """What launch settings make of one pool's pages besides. Raises Unsupported as `weights_identity` does."""
    return shaping.of_pool(name, pool, server_args(), by_path=bool(weights_id))


def _loaded(arguments: Any, model_path: str) -> str:
    path = model_path or str(getattr(arguments, "model_path", "") or "")
    if not path:
        raise Unsupported("cannot tell which weights this worker runs", 'set "model_path" or "weights_id" under "kvd"')
    digest = hashlib.sha256(fingerprint(folder(path, getattr(arguments, "revision", None))).encode())
    names = ("quantization", "json_model_override_args", "load_format", "model_loader_extra_config", "model_impl")
    digest.update(json.dumps([str(getattr(arguments, name, None)) for name in names]).encode())
    if str(getattr(arguments, "load_format", "")) == "dummy":
        digest.update(os.urandom(16))  # weights made up at start: never the same as anybody's
    return digest.hexdigest()
