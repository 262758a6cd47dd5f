"""The controller of 0.5.5, and the base of 0.5.10's: the first storage exception ends its thread for good.

Threads: P looks up, IO reads, B writes. Host slots are taken before the lookup; what is not used is released
by P (beyond the hit) and by IO (beyond what arrived), and only after the plugin's call has returned.
"""

import queue
from typing import Self

from tests.sglang_controller.controller_base import Controller
from tests.sglang_controller.operations import Operation, Prefetch
from tests.sglang_controller.ranks import CollectiveTimeout
from tests.sglang_controller.releases import BATCH_PAGES, R055


class Controller055(Controller):
    """0.5.5: attached once at start, never detached, always the generic (flat page) get and set."""

    release = R055

    def attach(self) -> Self:
        self._create_backend()
        self._register("register_mem_pool_host", self.mem_pool_host)
        self.enable_storage = True
        self._start()
        return self

    def detach(self) -> bool:
        """0.5.5 has no detach: the process ends under its daemon threads, and `close` is never called."""
        self.stop_event.set()
        self._wake()
        stopped = self._join(("P", "IO", "B"), "exit")
        self.backend, self.enable_storage = None, False
        return stopped

    def reset(self) -> bool:
        """P and B are joined without limit, IO not at all: a slow one outlives the flush and runs twice."""
        self.stop_event.set()
        if not self._join(("P", "B"), "flush"):
            return False
        for work in (self.prefetch_queue, self.backup_queue):
            work.queue.clear()
        self.stop_event.clear()
        if self.enable_storage:
            self._start()
        return True

    def _start(self) -> None:
        self.dead -= {"P", "B", "IO"}
        self._spawn("P", self._prefetch_loop)
        self._spawn("B", self._backup_loop)

    # --- prefetch

    def _stage(self, operation: Prefetch) -> None:
        assert operation.staging is not None
        operation.host_indices = operation.staging[: len(operation.all_keys) * self.page_size]

    def wait_prefetch(self, operation: Prefetch, timeout_s: float = 30.0) -> int:
        def hopeless() -> bool:
            return bool(self.dead & ({"P", "IO"} if operation.hit_pages is None else {"IO"}))

        self._await(operation, hopeless, timeout_s, "prefetch")
        if operation.revoked:
            return 0
        operation.mark_terminate()
        completed = operation.completed_tokens
        try:
            agreed = self._reduce("scheduler", [completed])[0]
        except CollectiveTimeout as error:
            self.recorder.fail("stuck", "S", "all_reduce", str(error), error)
            return 0
        if operation.host_indices is not None:
            self._release_pages(operation.host_indices[agreed:completed])
        return agreed // self.page_size

    def _prefetch_loop(self) -> None:
        self.prefetch_buffer = queue.Queue()
        self._spawn("IO", self._io_loop)
        while not self.stop_event.is_set() or not self.prefetch_queue.empty():
            try:
                operation = self.prefetch_queue.get(timeout=self.poll_s)
            except queue.Empty:
                continue
            if operation is not None:
                self._look_up(operation)

    def _look_up(self, operation: Prefetch) -> None:
        hashes, hit = self._storage_hit_query(operation)
        hit = self._reduce("hits", [hit])[0]
        assert operation.host_indices is not None
        if hit < self.prefetch_threshold:
            self._release_pages(operation.host_indices)
            operation.hit_pages, operation.revoked = hit // self.page_size, True
            operation.done.set()
            return
        operation.hash_value = hashes[: hit // self.page_size]
        self._release_pages(operation.host_indices[hit:])
        operation.host_indices = operation.host_indices[:hit]
        operation.hit_pages = hit // self.page_size
        self.prefetch_buffer.put(operation)

    def _storage_hit_query(self, operation: Prefetch) -> tuple[list[str], int]:
        """Lookups of at most 128 pages, until one is short; the prefix list grows in place between them."""
        prefix_keys = list(operation.prefix_keys) if operation.prefix_keys else None
        found: list[str] = []
        hit = 0
        for start in range(0, len(operation.all_keys), BATCH_PAGES):
            batch = operation.all_keys[start : start + BATCH_PAGES]
            pages = self.recorder.call("P", self.backend, "batch_exists", batch, self._extra_info(prefix_keys))
            found.extend(batch[:pages])
            hit += pages * self.page_size
            if pages < len(batch):
                break
            if prefix_keys:
                prefix_keys += batch
        return found, hit

    def _io_loop(self) -> None:
        while not self.stop_event.is_set():
            try:
                operation = self.prefetch_buffer.get(timeout=self.poll_s)
            except queue.Empty:
                continue
            if operation is None:
                continue
            self._page_transfer(operation)
            assert operation.host_indices is not None
            self._release_pages(operation.host_indices[operation.completed_tokens :])
            operation.done.set()

    def _page_transfer(self, operation: Prefetch) -> None:
        self._transfer_kv(operation)
        if self.release is R055:  # this release gives the unread pages back here, and its caller does so again
            assert operation.host_indices is not None
            self._release_pages(operation.host_indices[operation.completed_tokens :])

    def _transfer_kv(self, operation: Prefetch) -> None:
        prefix_keys = operation.prefix_keys
        assert operation.host_indices is not None
        for i in range(0, len(operation.hash_value), BATCH_PAGES):
            batch = operation.hash_value[i : i + BATCH_PAGES]
            before = operation.completed_tokens
            self._page_get(operation, batch, i, self._extra_info(prefix_keys))
            if operation.completed_tokens != before + len(batch) * self.page_size:
                operation.mark_terminate()
                return
            if prefix_keys:
                prefix_keys += batch

    def _page_get(self, operation: Prefetch, keys: list[str], first: int, extra_info: object) -> None:
        assert operation.host_indices is not None
        slots = operation.host_indices[first * self.page_size : (first + len(keys)) * self.page_size]
        if self.zero_copy:
            results = self.recorder.call("IO", self.backend, "batch_get_v1", keys, slots, extra_info)
            arrived = 0
            for i in range(len(keys)):
                if not results[i]:
                    break
                arrived += self.page_size
            operation.increment(arrived)
            return
        targets = [self._flat_pool.get_dummy_flat_data_page() for _ in keys]
        pages = self.recorder.call("IO", self.backend, "batch_get", keys, targets)
        if pages is None:
            return
        for i in range(len(keys)):
            if pages[i] is None:
                return
            self._flat_pool.set_from_flat_data_page(slots[i * self.page_size], pages[i])
            if not operation.increment(self.page_size):
                return

    # --- backup

    def _backup_loop(self) -> None:
        while not self.stop_event.is_set():
            try:
                operation = self.backup_queue.get(timeout=self.poll_s)
            except queue.Empty:
                continue
            if operation is None:
                continue
            if not self.backup_skip:
                self._page_backup(operation)
            operation.done.set()

    def _page_backup(self, operation: Operation) -> None:
        prefix_keys = operation.prefix_keys
        assert operation.host_indices is not None
        for i in range(0, len(operation.hash_value), BATCH_PAGES):
            batch = operation.hash_value[i : i + BATCH_PAGES]
            slots = operation.host_indices[i * self.page_size : (i + len(batch)) * self.page_size]
            if not self._page_set(batch, slots, self._extra_info(prefix_keys)):
                return
            if prefix_keys:
                prefix_keys += batch
            operation.completed_tokens += self.page_size * len(batch)
