"""The controller of 0.5.10: 0.5.5's threads, with attach and detach, zero copy and one side pool."""

from typing import Self

from tests.sglang_controller.controller_055 import Controller055
from tests.sglang_controller.controller_base import AttachFailed
from tests.sglang_controller.operations import Operation, Prefetch
from tests.sglang_controller.releases import R0510


class Controller0510(Controller055):
    """0.5.10: attach and detach at run time, zero copy on request, and one kind of side pool (Mamba).

    With side pools the plugin is registered a *group*, the storage threads already run when the v2
    registrations come, the lookup is one call for the whole span, and side pools are read before KV.
    """

    release = R0510

    @property
    def hybrid(self) -> bool:
        return bool(self.side_pools)

    def attach(self) -> Self:
        if self.hybrid:
            self.config_values.setdefault("enable_storage_metrics", False)  # never passed on in this release
        try:
            self._create_backend()
            self._register("register_mem_pool_host", self.mem_pool_host)
        except AttachFailed:
            if self.backend is not None:
                self._close()
            raise
        self.enable_storage = True
        self.stop_event.clear()
        self._start()
        if self.hybrid:
            for entry in self.mem_pool_host.entries:
                self._register("register_mem_host_pool_v2", entry.host_pool, entry.name)
        return self

    def detach(self) -> bool:
        """`close` is called only after every thread ended; a thread stuck for 10 s aborts the detach."""
        self.stop_event.set()
        self._wake()
        if not self._join(("P", "B", "IO"), "detach"):
            return False
        if self.backend is not None:
            self._close()
        self.stop_event.clear()
        return True

    def _stage(self, operation: Prefetch) -> None:
        super()._stage(operation)
        for transfer, side in zip(operation.transfers or [], operation.sides, strict=True):
            transfer.host_indices = side.host_indices

    def _storage_hit_query(self, operation: Prefetch) -> tuple[list[str], int]:
        if not self.hybrid:
            return super()._storage_hit_query(operation)
        keys = list(operation.all_keys)
        extra_info = self._extra_info(list(operation.prefix_keys) if operation.prefix_keys else None)
        if operation.transfers:
            result = self.recorder.call("P", self.backend, "batch_exists_v2", keys, operation.transfers, extra_info)
            pages = result.kv_hit_pages
        else:
            pages = self.recorder.call("P", self.backend, "batch_exists", keys, extra_info)
        for transfer in (operation.transfers or []) if pages > 0 else []:
            window = len(transfer.keys) if transfer.keys else 1
            transfer.keys = keys[max(0, pages - window) : pages]  # this rank's own hit, before ranks agree
        return keys[:pages], pages * self.page_size

    def _page_transfer(self, operation: Prefetch) -> None:
        if operation.transfers and not operation.is_terminated():
            results = self.recorder.call("IO", self.backend, "batch_get_v2", operation.transfers)
            operation.pool_hits |= {getattr(name, "value", name): sum(oks) for name, oks in results.items()}
        super()._page_transfer(operation)

    def _page_backup(self, operation: Operation) -> None:
        if operation.transfers:
            results = self.recorder.call("B", self.backend, "batch_set_v2", operation.transfers)
            operation.pool_hits |= {getattr(name, "value", name): sum(oks) for name, oks in results.items()}
        super()._page_backup(operation)
