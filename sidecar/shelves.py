"""A worker's pools and their shelves: what SGLang registers, under the names that say exactly what it is.

Registering returns at once; the session's thread, which may take its time, reads the weights and names each pool
(`prepare`). Until a pool is named, and for good when it cannot be named safely, it has no shelf: every call is a miss.
A change of the weights in memory takes all shelves away and names the pools anew; what has been named so far is
forgotten from time to time, with the session that knows it.
"""

import logging
from collections import Counter
from typing import Any

from kvd import wire
from kvd.errors import KvdError, SettingsError, Unsupported
from kvd.sidecar import engine
from kvd.sidecar.config import PluginConfig, read_config
from kvd.sidecar.copier import Copier
from kvd.sidecar.identity import KV, Rank, namespace_spec
from kvd.sidecar.pool import PoolView, view_pool
from kvd.sidecar.session import Session
from kvd.sidecar.shelf import Shelf

log = logging.getLogger("kvd.plugin")

_MOST_SPECS = 128  # half of what kvd lets a session join
PIECES, FLAT = "pieces", "flat"  # a page in place, or as one tensor: the same bytes, maybe in another order


class Shelves:
    """`close` may be called twice. The constructor starts the session's thread; it waits for nothing."""

    def __init__(self, storage_config: Any, counters: Counter[str]) -> None:
        self._counters = counters
        self._label = str(getattr(storage_config, "model_name", None) or "worker")[:200]
        self._pools: dict[str, Any] = {}
        self._views: dict[str, PoolView] = {}
        self._shelves: dict[tuple[str, str], Shelf] = {}
        self._specs: list[wire.NamespaceSpec] = []
        self._weights = ""
        self._weight_version = engine.weight_version()
        self.config, self._rank, refusal = PluginConfig(), Rank((0, 1), (0, 1), (0, 1), False), ""
        try:
            self.config = read_config(getattr(storage_config, "extra_config", None))
            self._rank = Rank.of(storage_config, engine.nodes())
        except (SettingsError, Unsupported) as error:
            refusal = str(error)
        self.copier = Copier(self.config.copy_threads)
        label = f"{self._label} rank {self._rank.tp[0]}/{self._rank.tp[1]}"
        self.session = Session(self.config.socket_path(), label, self.prepare, counters)
        if refusal:
            self.session.turn_off(refusal)
        self.session.start()

    def register(self, name: str, pool: Any) -> None:
        """A pool, or another one under a name that is known."""
        if self._pools.get(name) is not pool:
            self._pools[name] = pool
            self._views.pop(name, None)
            for access in (PIECES, FLAT):
                self._shelves.pop((name, access), None)
        self.session.wake()

    @property
    def anchor_is_logical(self) -> bool:
        """The KV pool has no memory of its own: all data is in side pools."""
        return KV in self._pools and not _has_memory(self._pools[KV])

    @property
    def ready(self) -> bool:
        """Attached, every pool named, circuit closed: from here on pages come and go."""
        attachment = self.session.attachment
        if attachment is None or not self.session.circuit.closed or not self._pools or self._outdated:
            return False
        named = {name for name, _ in self._shelves}
        real = {name for name, pool in self._pools.items() if _has_memory(pool)}
        return real <= named and attachment.roster is self._specs and attachment.joined >= len(self._specs)

    @property
    def _outdated(self) -> bool:
        """The weights have just changed, or do so."""
        return engine.weights_change() or engine.weight_version() != self._weight_version

    def find(self, name: str, access: str = PIECES) -> Shelf | None:
        """The shelf of a pool, or None: not named yet, or outdated."""
        if self._outdated:
            self._counters["miss_weights_changed"] += 1
            self.session.wake()
            return None
        shelf = self._shelves.get((name, access))
        if shelf is None:
            self._counters["miss_not_ready"] += 1
        return shelf

    def view(self, name: str) -> PoolView | None:
        return self._views.get(name)

    def prepare(self) -> list[wire.NamespaceSpec]:
        """On the session's thread: identify the weights, name every new pool; all namespaces so far."""
        if self.session.circuit.off:
            return self._specs
        try:
            version = engine.weight_version()
            if version != self._weight_version:
                self._shelves, self._weight_version = {}, version
            if len(self._specs) >= _MOST_SPECS > len(self._shelves):
                self._shelves, self._specs = {}, []  # never changed but grown: shelves know their number in it
            if engine.weights_change():
                return self._specs
            if self._pools and not self._weights:
                self._weights = engine.weights_identity(self.config.model_path, self.config.weights_id)
            for name, pool in list(self._pools.items()):
                if _has_memory(pool):
                    self._name(name, pool)
        except KvdError as error:
            self.session.turn_off(str(error))
        except Exception as error:
            log.exception("kvd: cannot understand the host pools")
            self.session.turn_off(f"{type(error).__name__}: {error}")
        return self._specs

    def _name(self, name: str, pool: Any) -> None:
        if (name, PIECES) not in self._shelves and hasattr(pool, "get_page_buffer_meta"):
            view = view_pool(pool)
            if name == KV and view.page_bytes != _declared_bytes(pool):
                raise Unsupported(
                    f"{type(pool).__name__} says a page has {_declared_bytes(pool)} bytes but shows {view.page_bytes}",
                    "this SGLang cannot hand such a pool to a storage backend",
                )
            self._views[name] = view
            self._add(name, pool, view.page_bytes, PIECES)
        if name == KV and (name, FLAT) not in self._shelves:
            self._add(name, pool, _declared_bytes(pool), FLAT)

    def _add(self, name: str, pool: Any, page_bytes: int, access: str) -> None:
        weights = f"{self._weights}:{self._weight_version}"
        shaping = engine.pool_shaping(name, pool, self.config.weights_id)
        spec = namespace_spec(
            name, pool, page_bytes, access, self._rank, weights, self.config.tenant, self._label, shaping
        )
        if spec not in self._specs:
            self._specs.append(spec)
        number = self._specs.index(spec)
        self._shelves[name, access] = Shelf(
            self.session, self._specs, number, self.copier, self.config, self._counters
        )

    def close(self) -> None:
        self.session.close()
        self.copier.close()


def _has_memory(pool: Any) -> bool:
    return getattr(pool, "kv_buffer", pool) is not None


def _declared_bytes(pool: Any) -> int:
    return int(pool.size_per_token) * int(pool.page_size)
