"""The plugin: SGLang's HiCache storage interface on one side, shelves in kvd on the other.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "kvd",
      "module_path": "kvd.sidecar.hicache", "class_name": "KvdStorage", "interface_v1": 1, ...}'

SGLang calls it from its prefetch, IO, backup and scheduler threads. No method raises, blocks beyond its deadline,
or returns a list of another length than it was asked for: what fails is a miss, counted and said once. `clear`
wipes nothing: the pages belong to every worker of the node.

Source of the contract: sglang 0.5.23, srt/mem_cache/hicache_storage.py and srt/managers/cache_controller.py.
"""

import functools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from kvd.errors import KvdError, PeerError, Unavailable
from kvd.sidecar import engine
from kvd.sidecar.hits import Pool, restorable
from kvd.sidecar.identity import KV
from kvd.sidecar.pool import FlatPages, PoolView
from kvd.sidecar.shelf import Shelf
from kvd.sidecar.shelves import FLAT, PIECES, Shelves

log = logging.getLogger("kvd.plugin")

F = TypeVar("F", bound=Callable[..., Any])
_SPEEDS_KEPT = 1024  # between two reads of get_stats
_BATCH_PAGES = 128  # messages and deadlines are sized for SGLang's own batches


def _never_raises(miss: Callable[..., Any]) -> Callable[[F], F]:
    """Turn any failure into `miss(*arguments)`; a failure of kvd's opens the circuit."""

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def guarded(self: "KvdStorage", *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except (Unavailable, PeerError) as error:
                self._counters["miss_unavailable"] += 1
                if self._shelves is not None:
                    self._shelves.session.trip(str(error))
            except KvdError as error:
                self._counters["miss_refused"] += 1
                self._say_once(f"{method.__name__}: {error}")
            except Exception as error:
                self._counters["miss_bug"] += 1
                self._say_once(f"{method.__name__}: {type(error).__name__}: {error}")
            return miss(*args, **kwargs)

        return cast(F, guarded)

    return decorate


def _all_absent(keys: Sequence[str], *_: Any, **__: Any) -> list[bool]:
    return [False] * len(keys)


def _all_none(keys: Sequence[str], *_: Any, **__: Any) -> list[None]:
    return [None] * len(keys)


def _none_of(transfers: Sequence[Any] | None, *_: Any, **__: Any) -> dict[Any, list[bool]]:
    return {t.name: [False] * len(t.keys or ()) for t in transfers or ()}


class KvdStorage(engine.StorageBase):  # type: ignore[misc]  # the base is known only at run time
    """One per rank. Constructing it neither waits for kvd nor needs it."""

    def __init__(self, storage_config: Any = None, kwargs: Any = None, *_: Any, **__: Any) -> None:
        self._counters: Counter[str] = Counter()
        self._said: set[str] = set()
        self._speeds = {name: deque[tuple[int, float]](maxlen=_SPEEDS_KEPT) for name in ("prefetch", "backup")}
        self._shelves: Shelves | None = None
        self._access = FLAT
        try:
            extra = getattr(storage_config, "extra_config", None) or {}
            self._access = PIECES if extra.get("interface_v1") and engine.honours_interface_v1() else FLAT
            self._shelves = Shelves(storage_config, self._counters)
        except Exception:  # no threads or descriptors left: the worker matters more than its cache
            log.exception("kvd is OFF for this worker")

    # -- registration --------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any, *_: Any, **__: Any) -> None:
        """The KV pool; a pool without memory of its own anchors models whose data is in side pools."""
        self.mem_pool_host = mem_pool_host
        anchor = getattr(mem_pool_host, "anchor_entry", None)  # 0.5.10 hands over the group of a hybrid model's pools
        self._register(KV, mem_pool_host if anchor is None else anchor.host_pool)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any, *_: Any, **__: Any) -> None:
        self._register(_text(host_pool_name), host_pool)

    def on_host_pools_registered(self) -> None:
        """Nothing more to do: registering a pool is enough."""

    @_never_raises(lambda *_, **__: None)
    def _register(self, name: str, pool: Any) -> None:
        if self._shelves is not None:
            self._shelves.register(name, pool)

    @property
    def ready(self) -> bool:
        """Attached, every registered pool named, circuit closed: from here on pages come and go."""
        return self._shelves is not None and self._shelves.ready

    @property
    def circuit(self) -> str:
        """ "closed", "open: why" or "off: why"."""
        return str(self._shelves.session.circuit) if self._shelves is not None else "off: could not start"

    def _shelf(self, name: str, access: str = PIECES) -> Shelf | None:
        return None if self._shelves is None else self._shelves.find(name, access)

    @property
    def _anchor_is_logical(self) -> bool:
        return self._shelves is not None and self._shelves.anchor_is_logical

    def _flat(self) -> Shelf | None:
        """The shelf of flat pages. A release that ignores "interface_v1" shows it by calling us this way."""
        self._access = FLAT
        return self._shelf(KV, FLAT)

    # -- lookup --------------------------------------------------------------------------------------------

    @_never_raises(lambda *_, **__: 0)
    def batch_exists(self, keys: list[str], extra_info: Any = None, *_: Any) -> int:
        """How many leading pages of the chain kvd holds, whole. They are held for the read that follows."""
        return self._leading(keys, extra_info)

    def exists(self, key: str) -> bool:
        return bool(self.batch_exists([key]) == 1)

    def _leading(self, keys: Sequence[str], extra_info: Any) -> int:
        if self._anchor_is_logical:
            return len(keys)
        shelf = self._shelf(KV, self._access)
        return shelf.has(keys, _prefix(extra_info)) if shelf is not None else 0

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Sequence[Any] | None = None, extra_info: Any = None, *_: Any
    ) -> Any:
        """The prefix lengths that every pool can restore."""
        return self._exists_v2(keys, pool_transfers, extra_info) or _transfer_result(0, {}, [])

    @_never_raises(lambda *_, **__: None)
    def _exists_v2(self, keys: Sequence[str], transfers: Sequence[Any] | None, extra_info: Any) -> Any:
        pages = self._leading(keys, extra_info)
        pools: list[Pool] = []
        for transfer in transfers or ():
            shelf = self._shelf(_text(transfer.name)) if pages else None
            present = shelf.has_each(keys[:pages]) if shelf is not None else [False] * pages
            window = max(1, len(transfer.keys or ()))
            pools.append(Pool(transfer.name, _text(transfer.hit_policy), present, window))
        hits, lengths = restorable(pages, pools)
        return _transfer_result(max(lengths, default=0), hits, lengths)

    # -- pages in place (interface_v1) ---------------------------------------------------------------------

    @_never_raises(_all_absent)
    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None, *_: Any) -> list[bool]:
        if self._anchor_is_logical:
            return [True] * len(keys)
        return self._take(KV, keys, host_indices, leading=True)

    @_never_raises(_all_absent)
    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None, *_: Any) -> list[bool]:
        if self._anchor_is_logical:
            return [True] * len(keys)
        prefix = _prefix(extra_info)
        done = self._put(KV, keys, host_indices, prefix[-1] if prefix else "", chained=True)
        return [done] * len(keys)

    def _view(self, name: str) -> PoolView | None:
        return None if self._shelves is None else self._shelves.view(name)

    def _take(self, name: str, keys: Sequence[str], host_indices: Any, leading: bool) -> list[bool]:
        shelf, view = self._shelf(name), self._view(name)
        if shelf is None or view is None or not keys:
            return [False] * len(keys)
        pages = view.pages_of(host_indices, len(keys))
        started = time.perf_counter()
        got: list[bool] = []
        for at in range(0, len(keys), _BATCH_PAGES):
            got += shelf.take(keys[at : at + _BATCH_PAGES], view, pages[at : at + _BATCH_PAGES], leading)
            if leading and not got[-1]:
                break
        got += [False] * (len(keys) - len(got))
        shelf.settle(keys, got)
        self._clock("prefetch", sum(got), shelf.spec.page_bytes, started)
        return got

    def _put(self, name: str, keys: Sequence[str], host_indices: Any, parent: str, chained: bool) -> bool:
        shelf, view = self._shelf(name), self._view(name)
        if shelf is None or view is None:
            return False
        pages = view.pages_of(host_indices, len(keys))
        started = time.perf_counter()
        for at in range(0, len(keys), _BATCH_PAGES):
            batch = keys[at : at + _BATCH_PAGES]
            if not shelf.put(batch, view, pages[at : at + _BATCH_PAGES], parent, chained):
                return False
            parent = batch[-1]
        self._clock("backup", len(keys), shelf.spec.page_bytes, started)
        return True

    # -- flat pages (without interface_v1, and releases that do not know it) -------------------------------

    @_never_raises(_all_none)
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None, *_: Any) -> list[Any]:
        """Fills the given tensors; None for each page that is absent."""
        shelf = self._flat()
        if shelf is None or target_locations is None:
            return [None] * len(keys)
        got: list[bool] = []
        target = FlatPages(list(target_locations))
        for at in range(0, len(keys), _BATCH_PAGES):
            batch = keys[at : at + _BATCH_PAGES]
            got += shelf.take(batch, target, range(at, at + len(batch)))
        shelf.settle(keys, got)
        return [tensor if right else None for tensor, right in zip(target_locations, got, strict=True)]

    @_never_raises(lambda *_, **__: False)
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None, *_: Any
    ) -> bool:
        shelf = self._flat()
        if shelf is None or values is None:
            return False
        source, parent = FlatPages(list(values)), ""
        for at in range(0, len(keys), _BATCH_PAGES):
            batch = keys[at : at + _BATCH_PAGES]
            if not shelf.put(batch, source, range(at, at + len(batch)), parent):
                return False
            parent = batch[-1]
        return True

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return bool(self.batch_set([key], None if value is None else [value]))

    # -- side pools ----------------------------------------------------------------------------------------

    @_never_raises(_none_of)
    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None, *_: Any) -> dict[Any, list[bool]]:
        return {t.name: self._side(self._take, t, False) for t in transfers or ()}

    @_never_raises(_none_of)
    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None, *_: Any) -> dict[Any, list[bool]]:
        def put(name: str, keys: Sequence[str], indices: Any, _: bool) -> list[bool]:
            return [self._put(name, keys, indices, "", chained=False)] * len(keys)

        return {t.name: self._side(put, t, False) for t in transfers or ()}

    @staticmethod
    def _side(move: Callable[..., list[bool]], transfer: Any, leading: bool) -> list[bool]:
        keys = list(transfer.keys or ())
        if not keys or transfer.host_indices is None:
            return [False] * len(keys)
        try:
            return move(_text(transfer.name), keys, transfer.host_indices, leading)
        except ValueError:  # slots that do not fit the keys: nothing of this pool moves, the others do
            return [False] * len(keys)

    # -- the rest ------------------------------------------------------------------------------------------

    def clear(self, *_: Any, **__: Any) -> bool:
        """Wipes nothing: SGLang calls this on role switches too, and the pages are everybody's."""
        self._counters["clear_ignored"] += 1
        self._say_once("clear() was asked for and ignored: pages are shared by all workers of the node")
        return True

    @_never_raises(lambda *_, **__: None)
    def get_stats(self) -> Any:
        """A StorageMetrics with what happened since the last call, or None."""
        metrics = engine.new_metrics()
        if metrics is not None:
            for name, seen in self._speeds.items():
                pages, speeds = getattr(metrics, f"{name}_pgs"), getattr(metrics, f"{name}_bandwidth")
                while seen:
                    count, gb_per_s = seen.popleft()
                    pages.append(count)
                    speeds.append(gb_per_s)
        return metrics

    def stats(self) -> dict[str, int]:
        """Counters since the start, as `kvdctl workers` shows them."""
        return dict(self._counters)

    def close(self) -> None:
        """Detach. Idempotent, well under a second."""
        if self._shelves is not None:
            self._shelves.close()

    def _clock(self, what: str, pages: int, page_bytes: int, started: float) -> None:
        seconds = time.perf_counter() - started
        self._counters[f"{what}_us"] += int(1e6 * seconds)
        if pages:
            self._speeds[what].append((pages, pages * page_bytes / seconds / 1e9))

    def _say_once(self, what: str) -> None:
        if what not in self._said and len(self._said) < 64:
            self._said.add(what)
            log.warning("kvd (pid %d): %s", os.getpid(), what)


def _prefix(extra_info: Any) -> Sequence[str]:
    """The keys of the pages before a call's own, where SGLang was told to pass them."""
    prefix = getattr(extra_info, "prefix_keys", None)
    return prefix if isinstance(prefix, list | tuple) and all(isinstance(key, str) for key in prefix[-1:]) else ()


def _text(name: Any) -> str:
    return str(getattr(name, "value", name))


def _transfer_result(pages: int, hits: dict[Any, int], lengths: list[int]) -> Any:
    """SGLang's record; older releases have it without the list of lengths."""
    kind = engine.PoolTransferResult
    if kind is None:
        return pages
    try:
        return kind(pages, hits, lengths)
    except TypeError:
        return kind(pages, hits)
