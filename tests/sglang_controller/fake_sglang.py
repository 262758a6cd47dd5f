"""A fake `sglang` package, so that a plugin's import probing finds what the release had, and no more.

Each release's names sit at that release's module paths only. Nothing here computes anything.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from tests.sglang_controller import keys, pools
from tests.sglang_controller.releases import Release

STORAGE_MODULE = "sglang.srt.mem_cache.hicache_storage"


def _native_hash(token_ids: Any, prior_hash: str | None = None, page_size: int | None = None) -> str | list[str]:
    """0.5.23's get_hash_str: one hash, or with a page size the whole chain at once."""
    if page_size is None:
        return keys.page_key(list(token_ids), prior_hash)
    return keys.page_keys(list(token_ids), page_size, prior=prior_hash)


def _retired() -> NoReturn:
    raise RuntimeError("get_global_server_args() is retired. get_server_args() still answers the raw input.")


def _not_published() -> NoReturn:
    raise ValueError("Global server args is not set yet!")


def _accessor(server_args: Any) -> Callable[[], Any]:
    return (lambda: server_args) if server_args is not None else _not_published


def fake_modules(release: Release, server_args: Any = None) -> dict[str, dict[str, Any]]:
    """Module path -> the names in it. `server_args=None` is a process where nothing is published yet."""
    version = release.version
    public = {name: value for name, value in vars(release.stub).items() if not name.startswith("_")}
    storage = {n: v for n, v in public.items() if getattr(v, "__module__", "") == release.stub.__name__}
    storage |= {n: v for n, v in public.items() if n == "STORAGE_BATCH_SIZE"}
    host_pools: dict[str, Any] = {
        "HostKVCache": pools.HostKVCache,
        "MHATokenToKVPoolHost": pools.MHATokenToKVPoolHost,
        "MLATokenToKVPoolHost": pools.MLATokenToKVPoolHost,
    }
    modules: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": version},
        "sglang.version": {"__version__": version},
        STORAGE_MODULE: storage,
        release.metrics_module: {"StorageMetrics": release.metrics_class},
    }
    if version == "0.5.23":
        modules["sglang.srt.mem_cache.utils"] = {
            "get_hash_str": _native_hash,
            "storage_namespace_seed": keys.namespace_seed,
            "hash_str_to_int64": keys.event_hash,
        }
        group = {"HostPoolGroup": pools.HostPoolGroup, "PoolEntry": pools.PoolEntry}
        modules["sglang.srt.mem_cache.pool_host"] = {"HostKVCache": pools.HostKVCache} | group
        modules["sglang.srt.mem_cache.memory_pool_host"] = {"LogicalHostPool": pools.LogicalHostPool}
        modules["sglang.srt.server_args"] = {"get_global_server_args": _retired}
        modules["sglang.srt.runtime_context"] = {"get_server_args": _accessor(server_args)}
        return modules
    if version == "0.5.10":
        host_pools |= {
            "MambaPoolHost": pools.MambaPoolHost,
            "HostPoolGroup": pools.HostPoolGroup,
            "PoolEntry": pools.PoolEntry,
        }
    modules["sglang.srt.mem_cache.memory_pool_host"] = host_pools
    modules["sglang.srt.server_args"] = {"get_global_server_args": _accessor(server_args)}
    return modules


def install_fake_sglang(target: Any, release: Release, server_args: Any = None) -> None:
    """Put the package into `sys.modules`; `target` is pytest's monkeypatch (undone with it) or a dict."""

    def put(name: str, module: ModuleType) -> None:
        if isinstance(target, dict):
            target[name] = module
        else:
            target.setitem(sys.modules, name, module)

    built: dict[str, ModuleType] = {}
    for path, names in fake_modules(release, server_args).items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in built:
                built[name] = ModuleType(name)
                built[name].__path__ = []
                if depth > 1:
                    setattr(built[".".join(parts[: depth - 1])], parts[depth - 1], built[name])
        for attribute, value in names.items():
            setattr(built[path], attribute, value)
    for name, module in built.items():
        put(name, module)


@contextmanager
def fake_sglang(release: Release, server_args: Any = None) -> Iterator[None]:
    """The fake package for one `with` block; what was imported under the name before comes back after."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "sglang"}
    for name in before:
        del sys.modules[name]
    install_fake_sglang(sys.modules, release, server_args)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
            del sys.modules[name]
        sys.modules.update(before)


def server_args(**values: Any) -> SimpleNamespace:
    """The few server arguments a plugin may want: the model's path and the names it was given."""
    defaults = {
        "model_path": "/models/sim",
        "served_model_name": "sim-model",
        "revision": None,
        "page_size": 4,
    }
    return SimpleNamespace(**defaults | values)


def load_backend_class(module_path: str, class_name: str, forget: tuple[str, ...] = ()) -> type[Any]:
    """Import a plugin as SGLang's factory does, after forgetting modules below the `forget` prefixes.

    A plugin picks its base class when first imported, so a test that changes release must import it afresh.
    Raises TypeError unless it derives from the HiCacheStorage now importable, as the factory does.
    """
    for name in [name for name in sys.modules if any(name == p or name.startswith(p + ".") for p in forget)]:
        del sys.modules[name]
    backend: type[Any] = getattr(importlib.import_module(module_path), class_name)
    storage = importlib.import_module(STORAGE_MODULE)
    if not issubclass(backend, storage.HiCacheStorage):
        raise TypeError(f"Backend class {class_name} must inherit from HiCacheStorage")
    return backend
