"""What workers said about the namespaces they joined: for people (`kvdctl ls`), and to find a model's side pools.

Pure, and bounded whatever peers announce: the namespaces announced longest ago are forgotten first. Forgetting one
costs its name in listings and nothing else.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvd.wire import NamespaceSpec

MOST = 4096


@dataclass(slots=True)
class Labels:
    """Namespace digest -> what was said last."""

    _specs: OrderedDict[bytes, NamespaceSpec] = field(default_factory=OrderedDict)
    _families: dict[bytes, set[bytes]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._specs)

    def get(self, digest: bytes) -> NamespaceSpec | None:
        return self._specs.get(digest)

    def digests(self) -> list[bytes]:
        """All namespaces that something was said about."""
        return list(self._specs)

    def add(self, spec: NamespaceSpec) -> None:
        self.forget(spec.digest)
        self._specs[spec.digest] = spec
        if spec.family:
            self._families.setdefault(spec.family, set()).add(spec.digest)
        while len(self._specs) > MOST:
            self.forget(next(iter(self._specs)))

    def forget(self, digest: bytes) -> None:
        """A no-op for what is not known."""
        spec = self._specs.pop(digest, None)
        if spec is not None and spec.family in self._families:
            family = self._families[spec.family]
            family.discard(digest)
            if not family:
                del self._families[spec.family]

    def side_pools(self, digest: bytes) -> list[bytes]:
        """The other pools of a model whose KV pool this is; none for any other namespace."""
        spec = self._specs.get(digest)
        if spec is None or spec.pool != "kv" or not spec.family:
            return []
        return [other for other in self._families[spec.family] if other != digest]
