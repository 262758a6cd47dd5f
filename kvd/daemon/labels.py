"""What workers said about the namespaces they joined: names for people (`kvdctl ls`), a model's side pools, whose
pages they are, and what computing one again takes.

Pure, and bounded whatever peers announce: the namespaces announced longest ago are forgotten first. Forgetting one
costs its name in listings, and until a worker joins again its tenant and what is known of its worth; no page.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvd.daemon.gate import Prefill
from kvd.wire import NamespaceSpec

MOST = 4096
_UNKNOWN = Prefill(0.0)


@dataclass(slots=True)
class Labels:
    """Namespace digest -> what was said last."""

    _specs: OrderedDict[bytes, NamespaceSpec] = field(default_factory=OrderedDict)
    _families: dict[bytes, set[bytes]] = field(default_factory=dict)
    _prefill: dict[bytes, Prefill] = field(default_factory=dict)  # the last known

    def __len__(self) -> int:
        return len(self._specs)

    def get(self, digest: bytes) -> NamespaceSpec | None:
        return self._specs.get(digest)

    def digests(self) -> list[bytes]:
        """All namespaces that something was said about."""
        return list(self._specs)

    def add(self, spec: NamespaceSpec) -> None:
        prefill = self._prefill.get(spec.digest)
        self.forget(spec.digest)
        self._specs[spec.digest] = spec
        if prefill is not None:
            self._prefill[spec.digest] = prefill
        if spec.family:
            self._families.setdefault(spec.family, set()).add(spec.digest)
        while len(self._specs) > MOST:
            self.forget(next(iter(self._specs)))

    def forget(self, digest: bytes) -> None:
        """A no-op for what is not known."""
        spec = self._specs.pop(digest, None)
        self._prefill.pop(digest, None)
        if spec is not None and spec.family in self._families:
            family = self._families[spec.family]
            family.discard(digest)
            if not family:
                del self._families[spec.family]

    def tenant(self, digest: bytes) -> str:
        """Whose pages these are; "" where nobody said."""
        spec = self._specs.get(digest)
        return spec.tenant if spec is not None else ""

    def tenants(self) -> list[tuple[bytes, str]]:
        """Namespaces whose workers said whose they are."""
        return [(digest, spec.tenant) for digest, spec in self._specs.items() if spec.tenant]

    def measured(self, digest: bytes, prefill: Prefill) -> None:
        """A worker told what computing costs it."""
        if digest in self._specs and prefill.known:
            self._prefill[digest] = prefill

    def prefill(self, digest: bytes) -> Prefill:
        """What computing costs the workers of a namespace, as far as one of them told."""
        return self._prefill.get(digest, _UNKNOWN)

    def saved_s_per_byte(self, digest: bytes) -> float:
        """Seconds of prefill that a byte of these pages stands for; where nobody measured, as for the others."""
        if digest in self._prefill:
            return self._saved(digest)
        known = [self._saved(other) for other in self._prefill]
        return sum(known) / len(known) if known else 1.0

    def _saved(self, digest: bytes) -> float:
        """By a first page."""
        spec = self._specs[digest]
        return max(0.0, self._prefill[digest].saved_s(0, spec.page_tokens)) / (spec.page_bytes * spec.shards)

    def side_pools(self, digest: bytes) -> list[bytes]:
        """The other pools of a model whose KV pool this is; none for any other namespace."""
        spec = self._specs.get(digest)
        if spec is None or spec.pool != "kv" or not spec.family:
            return []
        return [other for other in self._families[spec.family] if other != digest]
