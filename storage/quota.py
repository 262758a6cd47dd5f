"""Who may take whose room: what tenants are entitled to in one tier. Pure.

A tenant under its `reserve` loses nothing to others; one above its `burst` loses first; in between all are alike and
the policy alone decides. A tenant may always make room for itself at its own expense.

Always true: nobody is pushed below its reserve by another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

NOTHING: Final[Mapping[str, int]] = {}


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant is entitled to, in bytes."""

    reserve_bytes: int = 0
    burst_bytes: int | None = None  # None: no limit

    def __post_init__(self) -> None:
        if self.burst_bytes is not None and self.reserve_bytes > self.burst_bytes:
            raise ValueError(f"a reserve of {self.reserve_bytes} does not fit a burst of {self.burst_bytes}")


@dataclass(slots=True)
class Quotas:
    """What each tenant holds, next to what it is entitled to."""

    shares: dict[str, Share] = field(default_factory=dict)  # a tenant that is not named has neither reserve nor limit
    _held: dict[str, int] = field(default_factory=dict)  # bytes

    def held(self, tenant: str) -> int:
        return self._held.get(tenant, 0)

    def tenants(self) -> list[str]:
        """Who holds something, or has a share."""
        return sorted(self.shares.keys() | self._held.keys())

    def charge(self, tenant: str, size_bytes: int) -> None:
        """The tenant's page came in."""
        self._held[tenant] = self.held(tenant) + size_bytes

    def release(self, tenant: str, size_bytes: int) -> None:
        """The tenant's page left."""
        left = self.held(tenant) - size_bytes
        assert left >= 0, f"{tenant} releases more than it holds"
        if left:
            self._held[tenant] = left
        else:
            del self._held[tenant]

    def may_lose(self, owner: str, asker: str, size_bytes: int) -> bool:
        """Whether the asker's page may push out one of the owner's."""
        return owner == asker or self.held(owner) - size_bytes >= self.share(owner).reserve_bytes

    def above(self, tenant: str, leaving_bytes: int = 0) -> bool:
        """Whether it holds more than its burst, once so much of it has left."""
        burst = self.share(tenant).burst_bytes
        return burst is not None and self.held(tenant) - leaving_bytes > burst

    def share(self, tenant: str) -> Share:
        """What the tenant is entitled to."""
        return self.shares.get(tenant, _FREE)


_FREE = Share()


def loser(
    quotas: Quotas, asker: str, incoming_bytes: int, page_bytes: int, offers: Mapping[str, float],
    chosen: Mapping[str, int] = NOTHING,
) -> str | None:  # fmt: skip
    """Whose least dense page leaves so that the asker's pages fit; None: nobody may be asked for one.

    `offers`: the density of the next victim of each tenant that has one; a page of `page_bytes` leaves. `chosen`:
    bytes of each tenant that are about to leave. Tenants above their burst come first, whatever their pages are worth;
    an asker that would rise above its own takes from itself.
    """
    above = {owner: density for owner, density in offers.items() if quotas.above(owner, chosen.get(owner, 0))}
    if above:
        offers = above
    elif quotas.above(asker, chosen.get(asker, 0) - incoming_bytes):
        offers = {owner: density for owner, density in offers.items() if owner == asker}
    allowed = [owner for owner in offers if quotas.may_lose(owner, asker, page_bytes + chosen.get(owner, 0))]
    return min(allowed, key=lambda owner: (offers[owner], owner), default=None)
