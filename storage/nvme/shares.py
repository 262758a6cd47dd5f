"""What tenants are entitled to on the disk. Pure.

Whose a page is follows from its namespace, which the daemon tells once a worker has joined it; until then, and for who
has no share, a page is nobody's in particular. What each holds is counted whenever slots are ranked, and corrected
for what comes and is evicted in between; what is removed in another way is counted out the next time.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from kvd.pages import NAMESPACE_BYTES
from kvd.storage.quota import Share
from kvd.storage.tier import NAME_BYTES, Name

MOST_NAMESPACES = 1 << 14  # those that were told last

Names = npt.NDArray[np.void]
Mask = npt.NDArray[np.bool_]


class Shares:
    """All tenants'. `of`: what each is entitled to."""

    def __init__(self, of: Mapping[str, Share]) -> None:
        self.of = of
        self.held: Counter[str] = Counter()  # bytes, when last counted
        self._tenant: dict[bytes, str] = {}  # by namespace, of those that have a share

    def belongs(self, namespace: bytes, tenant: str) -> None:
        """The pages of this namespace are that tenant's."""
        if tenant in self.of:
            self._tenant.pop(namespace, None)
            self._tenant[namespace] = tenant
            if len(self._tenant) > MOST_NAMESPACES:
                del self._tenant[next(iter(self._tenant))]

    def count(self, slots: Iterable[tuple[Names, int]]) -> None:
        """Anew: the names of pages, and the bytes of a slot of them."""
        self.held.clear()
        for names, slot_bytes in slots:
            spaces = _namespaces(names)
            for namespace, tenant in self._tenant.items():
                self.held[tenant] += int((spaces == np.void(namespace)).sum()) * slot_bytes

    @property
    def active(self) -> bool:
        return bool(self._tenant)

    def sorted(self, names: Names, slot_bytes: int) -> tuple[Mask, Mask]:
        """Which of these pages leave before all others, for their tenant is above its burst; and which must stay."""
        first, stay = np.zeros(len(names), np.bool_), np.zeros(len(names), np.bool_)
        spaces = _namespaces(names)
        for namespace, tenant in self._tenant.items():
            share, held = self.of[tenant], self.held[tenant]
            if share.burst_bytes is not None and held > share.burst_bytes:
                first |= spaces == np.void(namespace)
            elif held - slot_bytes < share.reserve_bytes:
                stay |= spaces == np.void(namespace)
        return first, stay

    def came(self, name: Name, slot_bytes: int) -> None:
        """A page was stored."""
        tenant = self._tenant.get(name[:NAMESPACE_BYTES])
        if tenant is not None:
            self.held[tenant] += slot_bytes

    def leaves(self, name: Name, slot_bytes: int) -> bool:
        """Whether a page may leave; it is counted out then. Not if that took its tenant below the reserve."""
        tenant = self._tenant.get(name[:NAMESPACE_BYTES])
        if tenant is None:
            return True
        if self.held[tenant] - slot_bytes < self.of[tenant].reserve_bytes:
            return False
        self.held[tenant] -= slot_bytes
        return True


def _namespaces(names: Names) -> Names:
    parts = NAME_BYTES // NAMESPACE_BYTES
    return np.ascontiguousarray(names).view(f"V{NAMESPACE_BYTES}").reshape(-1, parts)[:, 0]
