"""Tensor parallelism in one process: a MIN all-reduce between controllers, and a driver of all ranks."""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from tests.sglang_controller.controller import Controller

T = TypeVar("T")


class CollectiveTimeout(Exception):
    """A rank never came: its thread is dead or stuck. A real worker would hang here until gloo gives up."""


class RankGroup:
    """One all-reduce stream per channel, as SGLang keeps one process group per purpose.

    Always true: the n-th call of every rank on a channel belongs together and carries equally many numbers.
    """

    def __init__(self, size: int, timeout_s: float = 5.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._changed = threading.Condition()
        self._turn: dict[tuple[str, int], int] = defaultdict(int)
        self._given: dict[tuple[str, int], dict[int, list[int]]] = defaultdict(dict)

    def all_reduce_min(self, channel: str, rank: int, values: Sequence[int]) -> list[int]:
        """Element-wise minimum over all ranks; blocks until the last one comes, at most `timeout_s`."""
        with self._changed:
            turn = self._turn[channel, rank]
            self._turn[channel, rank] = turn + 1
            given = self._given[channel, turn]
            given[rank] = list(values)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: len(given) == self.size, self.timeout_s):
                missing = sorted(set(range(self.size)) - set(given))
                raise CollectiveTimeout(f"{channel}: ranks {missing} never came")
            assert len({len(part) for part in given.values()}) == 1, f"{channel}: ranks disagree on the shape"
            return [min(column) for column in zip(*given.values(), strict=True)]


class TensorParallel:
    """One controller and one plugin instance per rank, driven in lockstep as one worker's schedulers are."""

    def __init__(self, controllers: Sequence["Controller"]) -> None:
        self.controllers = list(controllers)

    @classmethod
    def build(
        cls,
        controller: type["Controller"],
        backend_class: type[Any],
        pools: Sequence[Any],
        timeout_s: float = 5.0,
        side_pools: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ) -> "TensorParallel":
        """A rank for each pool (and each dict of side pools); `options` go to every controller."""
        group = RankGroup(len(pools), timeout_s)
        return cls(
            [
                controller(
                    backend_class, pool, group=group, tp_rank=rank, tp_size=len(pools),
                    side_pools=side_pools[rank] if side_pools else None, **options,
                )
                for rank, pool in enumerate(pools)
            ]
        )  # fmt: skip

    def _each(self, work: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(len(self.controllers)) as threads:
            return list(threads.map(work, range(len(self.controllers))))

    def attach(self) -> "TensorParallel":
        for controller in self.controllers:
            controller.attach()
        return self

    def prefetch(self, keys: Sequence[str], host_indices: Sequence[torch.Tensor], **options: Any) -> int:
        """Prefetch the same keys on every rank, each into its own slots; pages that every rank completed."""
        done = self._each(lambda rank: self.controllers[rank].prefetch(keys, host_indices[rank], **options))
        return min(done)

    def backup(self, keys: Sequence[str], host_indices: Sequence[torch.Tensor], **options: Any) -> list[int]:
        """Back up on every rank; pages acknowledged by each (0 on ranks that do not write)."""
        return self._each(lambda rank: self.controllers[rank].backup(keys, host_indices[rank], **options))

    def detach(self) -> bool:
        return all([controller.detach() for controller in self.controllers])

    @property
    def errors(self) -> list[Any]:
        return [failure for controller in self.controllers for failure in controller.errors]
