"""The controller of 0.5.23: attached like 0.5.10's, but every model's pools come as a group.

Threads: P looks up the whole span in one call, the scheduler allocates slots for the hit, IO reads KV (and
pools that share KV's slots) in batches and then the trailing pools, Y reduces progress over the ranks, B
writes side pools first and KV after.
"""

import queue
from typing import Any, Self

from tests.sglang_controller.controller_base import AttachFailed
from tests.sglang_controller.operations import Operation
from tests.sglang_controller.pools import HostPoolGroup, PoolEntry
from tests.sglang_controller.prefetch_0523 import PrefetchPath, leading_hits
from tests.sglang_controller.record import Role
from tests.sglang_controller.releases import BATCH_PAGES, R0523
from tests.sglang_controller.stub_0_5_23 import PoolName

_ROLES: tuple[Role, ...] = ("P", "B", "IO", "Y")


class Controller0523(PrefetchPath):
    """0.5.23: every model's pools come as a group, so v2 registration always happens, KV included."""

    release = R0523

    def attach(self) -> Self:
        try:
            self._create_backend()
            self._register("register_mem_pool_host", self.pool)
        except AttachFailed:
            if self.backend is not None:
                self._close()
            raise
        self.enable_storage = True
        self.stop_event.clear()
        self._start()
        for entry in self.mem_pool_host.entries:
            self._register("register_mem_host_pool_v2", entry.host_pool, entry.name)
        self._register("on_host_pools_registered")
        return self

    def register_side_pool(self, name: str, pool: Any) -> None:
        """A sidecar that appears after attach: one more v2 registration, with no word that it is the last."""
        entry = PoolEntry(PoolName(name), pool)
        self.mem_pool_host.entries.append(entry)
        self.mem_pool_host.entry_map[entry.name] = pool
        self.side_pools[name] = pool
        self._register("register_mem_host_pool_v2", pool, entry.name)

    def reset(self) -> bool:
        """Every thread gets 10 s; one that is still in a plugin call makes flush_cache raise."""
        if not self._stop("flush"):
            return False
        for work in (self.prefetch_queue, self.backup_queue, self.prefetch_buffer):
            work.queue.clear()
        self.stop_event.clear()
        if self.enable_storage:
            self._start()
        return True

    def detach(self) -> bool:
        """`close` is called only after every thread ended; a thread stuck for 10 s aborts the detach."""
        if not self._stop("detach"):
            return False
        if self.backend is not None:
            self._close()
        self.stop_event.clear()
        return True

    def _stop(self, where: str) -> bool:
        self.stop_event.set()
        self._wake()
        return self._join(_ROLES, where)

    def _start(self) -> None:
        self.dead.clear()
        self.acks = queue.Queue()
        self._spawn("P", lambda: self._serve(self.prefetch_queue, self._look_up))
        self._spawn("IO", lambda: self._serve(self.prefetch_buffer, self._read))
        self._spawn("Y", lambda: self._serve(self.acks, self._agree))
        self._spawn("B", lambda: self._serve(self.backup_queue, self._write))

    def _host_pool(self) -> Any:
        entries = [PoolEntry(PoolName.KV, self.pool, is_primary_index_anchor=True)]
        entries += [PoolEntry(PoolName(name), pool) for name, pool in self.side_pools.items()]
        return HostPoolGroup(entries)

    # --- backup (B)

    def _write(self, operation: Operation) -> None:
        try:
            self._write_all(operation)
        except Exception as error:
            self.recorder.blame("B", error)
        operation.done.set()

    def _write_all(self, operation: Operation) -> None:
        """Side pools whole and first; then KV. A rank that does not write KV still writes its Mamba state."""
        transfers = [t for t in operation.transfers or [] if not self.backup_skip or t.name is PoolName.MAMBA]
        results: dict[Any, list[bool]] = {}
        if transfers:
            for transfer in operation.transfers or []:
                if transfer.indices_from_pool is PoolName.KV:
                    transfer.host_indices, transfer.keys = operation.host_indices, operation.hash_value
            self._borrow_slots(operation.transfers or [])
            for extra_info, group in self._chains(operation, transfers):
                results |= self.recorder.call("B", self.backend, "batch_set_v2", group, extra_info=extra_info)
            operation.pool_hits = leading_hits(results)
        if not self.backup_skip:
            self._write_kv(operation)
            return
        good = bool(transfers) and all(
            len(results.get(t.name, [])) == len(t.keys) and all(results[t.name]) for t in transfers
        )
        operation.completed_tokens = len(operation.hash_value) * self.page_size if good else 0

    def _write_kv(self, operation: Operation) -> None:
        prefix_keys = operation.prefix_keys
        assert operation.host_indices is not None
        for i in range(0, len(operation.hash_value), BATCH_PAGES):
            batch = operation.hash_value[i : i + BATCH_PAGES]
            slots = operation.host_indices[i * self.page_size : (i + len(batch)) * self.page_size]
            if not self._page_set(batch, slots, self._extra_info(prefix_keys)):
                return
            prefix_keys = prefix_keys + batch if prefix_keys is not None else None
            operation.completed_tokens += self.page_size * len(batch)

    def _read_stats(self, stats: Any) -> Any:
        """None becomes empty metrics; the outcome snapshot is hung onto the plugin's own object."""
        stats = self.release.metrics_class() if stats is None else stats
        if not hasattr(stats, "prefetch_stats"):
            stats.prefetch_stats = {}
        return super()._read_stats(stats)
