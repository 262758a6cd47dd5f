"""What the scheduler asks of a controller in every release: prefetch, backup, and their transfers."""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.sglang_controller.attachment import AttachFailed, Attachment
from tests.sglang_controller.operations import PLACEHOLDER, Operation, Prefetch, Side

__all__ = ["AttachFailed", "Controller"]


class Controller(Attachment):
    """One rank's cache controller with one plugin instance; see `Attachment` for its arguments."""

    def start_prefetch(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        prefix_keys: Sequence[str] | None = None,
        sides: Sequence[Side] = (),
        assume_stored: bool = False,
    ) -> Prefetch:
        """Queue a prefetch of the uncached span `keys` into these slots and return at once."""
        prefixes = list(prefix_keys or []) if self.options.pass_prefix_keys else None
        operation = Prefetch([], None, prefixes, sides=sides, all_keys=list(keys), staging=host_indices)
        operation.assume_stored = assume_stored
        operation.transfers = self._prefetch_transfers(operation) or None
        self._stage(operation)
        self.prefetch_queue.put(operation)
        return operation

    def prefetch(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        prefix_keys: Sequence[str] | None = None,
        sides: Sequence[Side] = (),
        assume_stored: bool = False,
        timeout_s: float = 30.0,
    ) -> int:
        """Prefetch and wait; the pages that arrived, in order, on every rank."""
        operation = self.start_prefetch(keys, host_indices, prefix_keys, sides, assume_stored)
        return self.wait_prefetch(operation, timeout_s)

    @abstractmethod
    def wait_prefetch(self, operation: Prefetch, timeout_s: float = 30.0) -> int:
        """Wait for the end, a dead thread or the timeout; then terminate. Pages completed on all ranks."""

    def start_backup(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        prefix_keys: Sequence[str] | None = None,
        sides: Sequence[Side] = (),
    ) -> Operation:
        """Queue a backup of these pages and return at once."""
        prefixes = list(prefix_keys or []) if self.options.pass_prefix_keys else None
        operation = Operation(list(keys), host_indices, prefixes, sides=sides)
        operation.transfers = self._backup_transfers(operation) or None
        self.backup_queue.put(operation)
        return operation

    def backup(
        self,
        keys: Sequence[str],
        host_indices: torch.Tensor,
        prefix_keys: Sequence[str] | None = None,
        sides: Sequence[Side] = (),
        timeout_s: float = 30.0,
    ) -> int:
        """Back up and wait for the ack; pages the plugin acknowledged (0 on a rank that does not write)."""
        return self.wait_backup(self.start_backup(keys, host_indices, prefix_keys, sides), timeout_s)

    def wait_backup(self, operation: Operation, timeout_s: float = 30.0) -> int:
        self._await(operation, lambda: "B" in self.dead, timeout_s, "backup")
        return operation.completed_tokens // self.page_size

    def _await(self, operation: Operation, hopeless: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not operation.done.wait(self.poll_s) and not hopeless():
            if time.monotonic() > deadline:
                self.recorder.fail("stuck", "S", what, f"{what} not finished after {timeout_s} s")
                return

    @abstractmethod
    def _stage(self, operation: Prefetch) -> None:
        """Bind host slots now, where the release allocates before it knows the hit."""

    def _prefetch_transfers(self, operation: Prefetch) -> list[Any]:
        return [self._transfer(side, [PLACEHOLDER] * side.window, None) for side in operation.sides]

    def _backup_transfers(self, operation: Operation) -> list[Any]:
        return [
            self._transfer(side, operation.hash_value[-side.window :], side.host_indices) for side in operation.sides
        ]

    def _transfer(self, side: Side, keys: list[str], host_indices: torch.Tensor | None) -> Any:
        stub = self.release.stub
        source = stub.PoolName(side.from_pool) if side.from_pool else None
        policy = stub.PoolHitPolicy.TRAILING_PAGES if side.window else stub.PoolHitPolicy.ALL_PAGES
        return self.release.transfer(
            name=stub.PoolName(side.pool),
            host_indices=None if source else host_indices,
            keys=None if source is stub.PoolName.KV and keys == [] else keys,
            hit_policy=policy,
            indices_from_pool=source,
        )

    # --- the get and set calls

    def _extra_info(self, prefix_keys: list[str] | None) -> Any:
        return self.release.stub.HiCacheStorageExtraInfo(prefix_keys=prefix_keys)

    def _page_set(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any) -> bool:
        if self.zero_copy:
            return all(self.recorder.call("B", self.backend, "batch_set_v1", keys, host_indices, extra_info))
        data = [self._flat_pool.get_data_page(host_indices[i * self.page_size]) for i in range(len(keys))]
        return bool(self.recorder.call("B", self.backend, "batch_set", keys, data))

    @property
    def _flat_pool(self) -> Any:
        """Where the generic path reads and writes flat pages."""
        return self.mem_pool_host
