"""A plugin attached to one rank: config, registrations, threads, and the calls of the control path.

The test's own thread is the scheduler's (S). Storage threads really are threads, so a plugin that blocks or
raises does here what it does in a worker. Always true: every plugin call goes through the recorder.
"""

import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from tests.sglang_controller.fake_sglang import load_backend_class
from tests.sglang_controller.operations import Operation, Prefetch
from tests.sglang_controller.pools import HostPoolGroup, PoolEntry
from tests.sglang_controller.ranks import CollectiveTimeout, RankGroup
from tests.sglang_controller.record import Failure, Recorder, Role
from tests.sglang_controller.releases import Release, backend_options

_REPLICATED_POOLS = ("MLATokenToKVPoolHost", "LogicalHostPool")


class AttachFailed(Exception):
    """The plugin raised while being attached: at start-up this ends the worker."""


class Attachment(ABC):
    """One rank's cache controller with one plugin instance.

    `extra_config` is the JSON of the command line; `prefetch_threshold` (tokens) fills in for SGLang's 256.
    Further keywords set config fields of the release (pp_rank, dp_rank, ...). `poll_s` stands for SGLang's
    1 s queue timeouts; `join_timeout_s` for its 10 s, and for "for ever" where the release waits for ever.
    """

    release: ClassVar[Release]

    def __init__(
        self,
        backend_class: type[Any] | str,
        pool: Any,
        *,
        extra_config: Mapping[str, Any] | None = None,
        prefetch_threshold: int = 1,
        side_pools: Mapping[str, Any] | None = None,
        group: RankGroup | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
        model_name: str | None = "sim-model",
        enable_metrics: bool = True,
        join_timeout_s: float = 10.0,
        poll_s: float = 0.02,
        **config: Any,
    ) -> None:
        self.backend_class = backend_class
        self.pool = pool
        self.page_size: int = pool.page_size
        self.group, self.tp_rank, self.tp_size = group, tp_rank, tp_size
        self.model_name, self.enable_metrics = model_name, enable_metrics
        self.join_timeout_s, self.poll_s = join_timeout_s, poll_s
        self.options = backend_options(
            self.release, {"prefetch_threshold": prefetch_threshold} | dict(extra_config or {})
        )
        self.config_values = config
        self.side_pools = dict(side_pools or {})
        self.mem_pool_host = self._host_pool()
        self.recorder = Recorder()
        self.backend: Any = None
        self.enable_storage = False
        self.dead: set[Role] = set()
        self.released: list[int] = []
        self.stop_event = threading.Event()
        self.threads: list[tuple[Role, threading.Thread]] = []
        self.prefetch_queue: queue.Queue[Prefetch | None] = queue.Queue()
        self.prefetch_buffer: queue.Queue[Prefetch | None] = queue.Queue()
        self.backup_queue: queue.Queue[Operation | None] = queue.Queue()

    # --- attaching and leaving

    @abstractmethod
    def attach(self) -> Self:
        """Create the plugin and register pools as the release does; AttachFailed where it would die."""

    @abstractmethod
    def reset(self) -> bool:
        """flush_cache: stop and restart the storage threads. False where the worker would fail or hang."""

    @abstractmethod
    def detach(self) -> bool:
        """Stop the threads and let the plugin go; `close` is called as far as the release calls it."""

    def _host_pool(self) -> Any:
        """A hybrid model's pools come as a group; otherwise the KV pool stands alone."""
        if not self.side_pools:
            return self.pool
        names = self.release.stub.PoolName
        entries = [PoolEntry(names.KV, self.pool, is_primary_index_anchor=True)]
        entries += [PoolEntry(names(name), pool) for name, pool in self.side_pools.items()]
        return HostPoolGroup(entries)

    def _config(self) -> Any:
        extra = dict(self.options.rest)
        values: dict[str, Any] = {
            "tp_rank": self.tp_rank,
            "tp_size": self.tp_size,
            "is_mla_model": type(self.pool).__name__ in _REPLICATED_POOLS,
            "is_page_first_layout": self.pool.layout == "page_first",
            "model_name": self.model_name,
        }
        if self.release.version != "0.5.5":
            lcm = extra.pop("tp_lcm_size", None)
            values["tp_lcm_size"] = lcm
            values["should_split_heads"] = bool(
                lcm and lcm > self.tp_size and self.pool.layout == "page_head" and not values["is_mla_model"]
            )
            values["enable_storage_metrics"] = self.enable_metrics
        return self.release.config(**values | {"extra_config": extra} | self.config_values)

    def _create_backend(self) -> None:
        """The factory's call: two positional arguments, the second an empty dict."""
        self.config = self._config()
        backend = self.backend_class
        if isinstance(backend, str):
            module_path, class_name = backend.split(":")
            backend = load_backend_class(module_path, class_name)
        for key, value in (
            ("backend_name", "sim"),
            ("module_path", backend.__module__),
            ("class_name", backend.__qualname__),
        ):
            self.config.extra_config.setdefault(key, value)
        try:
            self.backend = backend(self.config, {})
        except Exception as error:
            self.recorder.fail("raised", "S", "__init__", repr(error), error)
            raise AttachFailed(f"constructor raised {error!r}") from error

    def _register(self, method: str, *args: Any) -> None:
        try:
            self.recorder.call("S", self.backend, method, *args)
        except Exception as error:
            raise AttachFailed(f"{method} raised {error!r}") from error

    @property
    def zero_copy(self) -> bool:
        """Whether this plugin gets the v1 calls; 0.5.5 never gives them to a dynamic backend."""
        return self.release.interface_v1 and bool(self.options.rest.get("interface_v1", 0))

    @property
    def backup_skip(self) -> bool:
        """Ranks that hold a replica do not write it again."""
        return bool(self.config.is_mla_model and self.tp_rank != 0)

    @property
    def prefetch_threshold(self) -> int:
        return max(self.options.prefetch_threshold, self.page_size)

    @property
    def errors(self) -> list[Failure]:
        """Everything the plugin did wrong so far."""
        return list(self.recorder.errors)

    # --- threads

    def _spawn(self, role: Role, target: Callable[[], None]) -> None:
        def run() -> None:
            try:
                target()
            except CollectiveTimeout as error:
                self.recorder.fail("stuck", role, "all_reduce", str(error), error)
                self.dead.add(role)
            except BaseException as error:
                self.recorder.blame(role, error)
                self.recorder.fail("dead", role, "", f"storage thread {role} ended")
                self.dead.add(role)

        thread = threading.Thread(target=run, name=f"sim-{role}-rank{self.tp_rank}", daemon=True)
        self.threads.append((role, thread))
        thread.start()

    def _join(self, roles: Sequence[Role], where: str) -> bool:
        """Join these threads, at most join_timeout_s each; one that still runs is the plugin's failure."""
        for role, thread in self.threads:
            if role in roles:
                thread.join(self.join_timeout_s)
        alive = [role for role, thread in self.threads if role in roles and thread.is_alive()]
        for role in alive:
            self.recorder.fail("stuck", role, where, f"storage thread {role} still in a plugin call at {where}")
        self.threads = [(role, thread) for role, thread in self.threads if thread.is_alive()]
        return not alive

    def _wake(self) -> None:
        self.prefetch_queue.put(None)
        self.backup_queue.put(None)
        self.prefetch_buffer.put(None)

    def _close(self) -> None:
        if hasattr(self.backend, "close"):
            with contextlib.suppress(Exception):  # the release logs and goes on; the recorder has it
                self.recorder.call("S", self.backend, "close")
        self.backend, self.enable_storage = None, False

    def _reduce(self, channel: str, values: Sequence[int]) -> list[int]:
        if self.group is None or self.group.size == 1:
            return list(values)
        return self.group.all_reduce_min(channel, self.tp_rank, values)

    def _release_pages(self, host_indices: torch.Tensor) -> None:
        self.released += [start // self.page_size for start in host_indices[:: self.page_size].tolist()]

    # --- the rest of the surface, from the scheduler's thread

    def clear(self) -> bool:
        """The HTTP request to clear the backend (and, since role switching exists, that too)."""
        if not self.enable_storage or not hasattr(self.backend, "clear"):
            return False
        try:
            self.recorder.call("S", self.backend, "clear")
        except Exception:
            return False
        return True

    def get_stats(self) -> Any:
        """What a metrics drain reads; raises whatever would end the scheduler (recorded as well)."""
        stats = self.recorder.call("S", self.backend, "get_stats")
        try:
            return self._read_stats(stats)
        except Exception as error:
            self.recorder.blame("S", error)
            raise

    def _read_stats(self, stats: Any) -> Any:
        if stats is None:
            return None
        assert isinstance(stats, self.release.metrics_class), f"not a StorageMetrics: {stats!r}"
        for values in (
            stats.prefetch_pgs,
            stats.backup_pgs,
            stats.prefetch_bandwidth,
            stats.backup_bandwidth,
        ):
            for value in values:
                float(value)
        return stats

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exc: object) -> None:
        self.detach()
