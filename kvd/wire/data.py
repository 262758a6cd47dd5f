"""The hot requests, over kvd.data: lookups, leases to read, reservations to write."""

from kvd.wire.base import Message


class Lookup(Message, tag="lookup", frozen=True):
    """How many leading keys are held? The fallback of the shared-memory index, and what starts a fetch from below.

    The read that follows will wait `wait_s` for pages on their way. `before` pages of the chain come before these
    keys, the last of them is `parent`; 0 and empty where that is not known.
    """

    request: int
    ns: int
    keys: bytes
    ttl_s: float
    wait_s: float = 1.0
    before: int = 0
    parent: bytes = b""


class LeasePages(Message, tag="lease", frozen=True):
    """The answer may take `wait_s`, where pages are on their way from a lower tier."""

    request: int
    ns: int
    keys: bytes
    ttl_s: float
    wait_s: float = 0.0


class ReleaseLease(Message, tag="release", frozen=True):
    """Not answered. `bad` are indices of rows whose bytes did not match their checksum."""

    lease: int
    bad: list[int] = []


class ReservePages(Message, tag="reserve", frozen=True):
    """Ask for places to write `keys`, a chain whose first key's parent is `parent` (empty: not known)."""

    request: int
    ns: int
    keys: bytes
    ttl_s: float
    parent: bytes = b""
    chained: bool = True


class CommitPages(Message, tag="commit", frozen=True):
    """Pages in `rows` are whole. With `more` to come there is no answer; else what is left is given up."""

    request: int
    reservation: int
    rows: bytes
    more: bool = False


class Found(Message, tag="found", frozen=True):
    request: int
    pages: int


class Leased(Message, tag="leased", frozen=True):
    """`lease` is 0 when no page was present."""

    request: int
    lease: int
    rows: bytes


class Reserved(Message, tag="reserved", frozen=True):
    request: int
    reservation: int
    rows: bytes


class Committed(Message, tag="committed", frozen=True):
    """How many pages of the reservation were taken in all."""

    request: int
    pages: int
