"""Who may take whose room: the value of a page, how long it may stay, pins, and what tenants are entitled to. Pure.

A tenant under its `reserve` loses nothing to others; one above its `burst` loses first; in between all are alike and
the policy alone decides. A tenant may always make room for itself at its own expense.

Always true: a pinned page is never a victim; nobody is pushed below its reserve by another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvd.storage.policy import Policy

UNLIMITED = 1 << 63


def value(density: float, saved_s: float, size_bytes: int) -> float:
    """Seconds of computing that each byte saves per second of residence: what pages of unequal size compare by.

    `density`: expected uses per second, from the policy. `saved_s`: recomputing the page's tokens takes that long.
    """
    return density * saved_s / size_bytes


def cheapest(offers: dict[int, tuple[float, float, int]]) -> int | None:
    """Of several sizes of pages, each with (density, saved_s, size_bytes) of its next victim, the one to take."""
    return min(offers, key=lambda name: (value(*offers[name]), name), default=None)


def expired(last_use: float, now: float, ttl_s: float | None) -> bool:
    """Whether a page has outstayed its time to live since it was last used. None: pages do not expire."""
    return ttl_s is not None and now - last_use >= ttl_s


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant is entitled to, in bytes."""

    reserve_bytes: int = 0
    burst_bytes: int = UNLIMITED

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_bytes <= self.burst_bytes:
            raise ValueError(f"a reserve of {self.reserve_bytes} does not fit a burst of {self.burst_bytes}")


@dataclass(slots=True)
class Quotas:
    """What each tenant holds, next to what it is entitled to."""

    shares: dict[str, Share] = field(default_factory=dict)  # a tenant that is not named has neither reserve nor limit
    _held: dict[str, int] = field(default_factory=dict)  # bytes

    def held(self, tenant: str) -> int:
        return self._held.get(tenant, 0)

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

    def share(self, tenant: str) -> Share:
        """What the tenant is entitled to."""
        return self.shares.get(tenant, _FREE)


_FREE = Share()


@dataclass(frozen=True, slots=True)
class Pages:
    """What the choice of victims asks about the pages of a tier, by place."""

    owner: Callable[[int], str]
    pinned: Callable[[int], bool]
    page_bytes: int


def victims(policy: Policy, quotas: Quotas, pages: Pages, asker: str, want: int, now: float) -> list[int]:
    """Up to `want` pages to let go so that the asker's pages fit. They are withdrawn from the policy.

    First those of tenants above their burst, whatever they are worth; an asker that would rise above its own burst
    is held to it by taking from itself.
    """
    lost: dict[str, int] = {}

    def allowed(place: int, only: Callable[[str], bool]) -> bool:
        owner = pages.owner(place)
        if pages.pinned(place) or not only(owner):
            return False
        gone = lost.get(owner, 0) + pages.page_bytes
        if not quotas.may_lose(owner, asker, gone):
            return False
        lost[owner] = gone
        return True

    def above(owner: str) -> bool:
        return quotas.held(owner) - lost.get(owner, 0) > quotas.share(owner).burst_bytes

    chosen = policy.victims(want, now, lambda place: allowed(place, above))
    left = want - len(chosen)
    if left:
        incoming = quotas.held(asker) + want * pages.page_bytes - lost.get(asker, 0)
        full = incoming > quotas.share(asker).burst_bytes
        chosen += policy.victims(left, now, lambda place: allowed(place, lambda owner: not full or owner == asker))
    return chosen
