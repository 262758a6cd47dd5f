"""Prefetch in 0.5.23: look up, agree, allocate, read, agree again.

Storage exceptions become misses. Every rank sends the same number of acks of each kind whatever went wrong,
because a thread of its own (Y) reduces them over the ranks one by one; an operation ends with its last ack.
"""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.sglang_controller.controller_base import Controller
from tests.sglang_controller.operations import Operation, Prefetch
from tests.sglang_controller.releases import BATCH_PAGES
from tests.sglang_controller.stub_0_5_23 import PoolHitPolicy, PoolName

_NO_VERDICT = 2**31 - 1


@dataclass
class _Ack:
    """A step of one prefetch, on its way to the other ranks. Every rank sends equally many of each kind."""

    operation: Prefetch
    completed_tokens: int | None = None
    pool_hits: dict[str, int] | None = None
    last: bool = False


def leading_hits(results: dict[Any, list[bool]]) -> dict[str, int]:
    """The leading run of successes of each pool."""
    return {getattr(n, "value", n): oks.index(False) if False in oks else len(oks) for n, oks in results.items()}


class PrefetchPath(Controller):
    """The part of the 0.5.23 controller that P, IO and Y run."""

    acks: "queue.Queue[_Ack]"

    def _serve(self, work: "queue.Queue[Any]", step: Callable[[Any], None]) -> None:
        while not self.stop_event.is_set():
            try:
                item = work.get(timeout=self.poll_s)
            except queue.Empty:
                continue
            if item is not None:
                step(item)

    @property
    def _flat_pool(self) -> Any:
        return self.pool

    # --- lookup (P), agreement between ranks, allocation (S)

    def _stage(self, operation: Prefetch) -> None:
        """Nothing yet: slots are taken once the hit is known."""

    def _look_up(self, operation: Prefetch) -> None:
        pages = 0
        try:
            if not operation.is_terminated():
                pages = self._query(operation)
        except Exception as error:
            self.recorder.blame("P", error)
        pages = self._agree_on_hit(operation, pages)
        operation.hash_value = operation.all_keys[:pages]
        operation.hit_pages = pages
        self._admit(operation)

    def _query(self, operation: Prefetch) -> int:
        keys = list(operation.all_keys)
        if operation.assume_stored:
            return len(keys)
        extra_info = self._extra_info(list(operation.prefix_keys) if operation.prefix_keys else None)
        if not operation.transfers:
            pages: int = self.recorder.call("P", self.backend, "batch_exists", keys, extra_info)
            operation.query_pool_hits = {"kv": pages}
            return pages * 1  # the release multiplies here too: a None goes no further
        result = self.recorder.call("P", self.backend, "batch_exists_v2", keys, operation.transfers, extra_info)
        operation.restorable = result.restorable_prefix_pages
        hits = {getattr(name, "value", name): count for name, count in result.extra_pool_hit_pages.items()}
        operation.query_pool_hits = {"kv": hits.get("kv", result.kv_hit_pages)}
        for transfer in operation.transfers:
            if transfer.name.value in hits:
                operation.query_pool_hits[transfer.name.value] = hits[transfer.name.value]
        return int(result.kv_hit_pages)

    def _agree_on_hit(self, operation: Prefetch, pages: int) -> int:
        """One reduction of the hit and each pool's own; with trailing pools, of a flag per prefix length."""
        sparse = any(t.hit_policy is PoolHitPolicy.TRAILING_PAGES for t in operation.transfers or [])
        flags = [pages]
        if sparse:
            flags = [1] + [0] * len(operation.all_keys)
            lengths = range(1, pages + 1) if operation.restorable is None else operation.restorable
            for length in lengths:
                if 0 < length <= pages:
                    flags[length] = 1
        local = operation.query_pool_hits
        reduced = self._reduce("hits", flags + [local.get(name.value, _NO_VERDICT) for name in PoolName])
        verdicts = zip(PoolName, reduced[len(flags) :], strict=True)
        operation.query_pool_hits = {name.value: hit for name, hit in verdicts if hit != _NO_VERDICT}
        if not sparse:
            return reduced[0]
        return max(length for length, ok in enumerate(reduced[: len(flags)]) if ok)

    def _admit(self, operation: Prefetch) -> None:
        """The scheduler's part: revoke a hit below the threshold, else take slots for exactly the hit."""
        assert operation.hit_pages is not None
        assert operation.staging is not None
        hit = operation.hit_pages
        if hit * self.page_size < self.prefetch_threshold or operation.is_terminated():
            operation.revoked = True
            operation.done.set()
            return
        operation.host_indices = operation.staging[: hit * self.page_size]
        for transfer, side in zip(operation.transfers or [], operation.sides, strict=True):
            if transfer.indices_from_pool is None and side.host_indices is not None:
                slots = min(len(transfer.keys or ()), hit) * self.side_pools[side.pool].page_size
                transfer.host_indices = side.host_indices[:slots]
        self.prefetch_buffer.put(operation)

    def wait_prefetch(self, operation: Prefetch, timeout_s: float = 30.0) -> int:
        self._await(operation, lambda: bool(self.dead & {"P", "IO", "Y"}), timeout_s, "prefetch")
        operation.mark_terminate()
        return operation.completed_tokens // self.page_size

    def decode_query(self, keys: list[str], prefix_keys: list[str] | None = None) -> int:
        """A decode worker asks in the scheduler's thread, where nothing catches what the plugin raises."""
        operation = Prefetch([], None, prefix_keys, all_keys=list(keys))
        extra_info = self._extra_info(list(prefix_keys) if prefix_keys else None)
        pages = self.recorder.call("S", self.backend, "batch_exists", list(operation.all_keys), extra_info)
        return self._reduce("decode", [pages * 1])[0]

    # --- reading (IO) and agreement on progress (Y)

    def _read(self, operation: Prefetch) -> None:
        try:
            pages = self._read_kv(operation)
            if operation.transfers is not None:
                self._read_sides(operation, pages)
        finally:
            self.acks.put(_Ack(operation, last=True))

    def _read_kv(self, operation: Prefetch) -> int:
        """128 pages at a time; after the first short batch only acks follow, for the other ranks' sake."""
        prefix_keys, going, completed = operation.prefix_keys, True, 0
        for i in range(0, len(operation.hash_value), BATCH_PAGES):
            going = going and not operation.is_terminated()
            if going:
                batch = operation.hash_value[i : i + BATCH_PAGES]
                try:
                    hit = self._read_batch(operation, batch, i, self._extra_info(prefix_keys))
                except Exception as error:
                    self.recorder.blame("IO", error)
                    hit = 0
                going = hit == len(batch)
                prefix_keys = prefix_keys + batch if prefix_keys is not None else None
                completed += hit
            self.acks.put(_Ack(operation, completed_tokens=completed * self.page_size))
        return completed

    def _read_batch(self, operation: Prefetch, keys: list[str], first: int, extra_info: Any) -> int:
        assert operation.host_indices is not None
        slots = operation.host_indices[first * self.page_size : (first + len(keys)) * self.page_size]
        hits = [self._page_get(operation, keys, slots, extra_info)]
        derived = [t for t in operation.transfers or [] if t.indices_from_pool is PoolName.KV]
        if derived:
            now = [self.release.transfer(name=t.name, host_indices=slots, keys=keys) for t in derived]
            results = self.recorder.call("IO", self.backend, "batch_get_v2", now, extra_info=extra_info)
            hits += leading_hits(results).values()
        return min(hits)

    def _page_get(self, operation: Prefetch, keys: list[str], slots: Any, extra_info: Any) -> int:
        if self.zero_copy:
            results = self.recorder.call("IO", self.backend, "batch_get_v1", keys, slots, extra_info)
            for i in range(len(keys)):
                if not results[i]:
                    return i
            return len(keys)
        targets = [self._flat_pool.get_dummy_flat_data_page() for _ in keys]
        pages = self.recorder.call("IO", self.backend, "batch_get", keys, targets)
        if pages is None:
            return 0
        for i in range(len(keys)):
            if pages[i] is None or operation.is_terminated():
                return i
            self._flat_pool.set_from_flat_data_page(slots[i * self.page_size], pages[i])
        return len(keys)

    def _read_sides(self, operation: Prefetch, kv_pages: int) -> None:
        """Trailing pools, once, and only if all of KV arrived."""
        hits: dict[str, int] = {}
        if not operation.is_terminated() and kv_pages == len(operation.hash_value):
            transfers = [t for t in operation.transfers or [] if t.indices_from_pool is not PoolName.KV]
            self._align_windows(transfers, operation.hash_value, kv_pages)
            self._borrow_slots(operation.transfers or [])
            try:
                results: dict[Any, list[bool]] = {}
                for extra_info, group in self._chains(operation, transfers):
                    results |= self.recorder.call("IO", self.backend, "batch_get_v2", group, extra_info=extra_info)
                hits = leading_hits(results)
            except Exception as error:
                self.recorder.blame("IO", error)
        self.acks.put(_Ack(operation, pool_hits=hits))

    def _align_windows(self, transfers: list[Any], hashes: list[str], pages: int) -> None:
        """The window becomes the last pages of the real hit; slots beyond it are given back."""
        for transfer in transfers:
            if transfer.hit_policy is PoolHitPolicy.TRAILING_PAGES:
                window = len(transfer.keys) if transfer.keys else 1
                transfer.keys = hashes[max(0, pages - window) : pages]
                if transfer.host_indices is not None and transfer.indices_from_pool is None:
                    slots = len(transfer.keys) * self.side_pools[transfer.name.value].page_size
                    transfer.host_indices = transfer.host_indices[:slots]

    @staticmethod
    def _borrow_slots(transfers: list[Any]) -> None:
        for transfer in transfers:
            if transfer.indices_from_pool not in (None, PoolName.KV):
                source = next(t for t in transfers if t.name is transfer.indices_from_pool)
                transfer.host_indices = source.host_indices
                transfer.keys = source.keys if transfer.keys is None else transfer.keys

    def _chains(self, operation: Operation, transfers: list[Any]) -> list[tuple[Any, list[Any]]]:
        """One call per window length when prefixes are passed, so that prefix_keys + keys stays one chain.

        Without prefixes it is one call, made even when no transfer is left for it.
        """
        if operation.prefix_keys is None:
            return [(self._extra_info(None), transfers)]
        groups: dict[int, list[Any]] = {}
        for transfer in transfers:
            groups.setdefault(len(operation.hash_value) - len(transfer.keys or ()), []).append(transfer)
        return [
            (self._extra_info(operation.prefix_keys + operation.hash_value[:covered]), group)
            for covered, group in groups.items()
        ]

    def _agree(self, ack: _Ack) -> None:
        if ack.completed_tokens is not None:
            ack.operation.completed_tokens = self._reduce("completion", [ack.completed_tokens])[0]
        if ack.pool_hits is not None:
            reduced = self._reduce("completion", [ack.pool_hits.get(name.value, 0) for name in PoolName])
            ack.operation.pool_hits = {name.value: hit for name, hit in zip(PoolName, reduced, strict=True) if hit}
        if ack.last:
            if ack.operation.host_indices is not None:
                self._release_pages(ack.operation.host_indices[ack.operation.completed_tokens :])
            ack.operation.done.set()
