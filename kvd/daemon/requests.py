"""What a worker may ask for: the parts of its requests, checked. Pure; raises PeerError or Refused."""

from kvd import wire
from kvd.daemon.sessions import Session
from kvd.errors import PeerError, Refused
from kvd.pages import KEY_BYTES, NAMESPACE_BYTES
from kvd.storage.arena import slot_bytes_for, slots_per_extent

MAX_TTL_S = 60.0
MAX_SHARDS = 1024
MAX_CHAIN = 1 << 32  # pages
MAX_HELD = 512  # leases and reservations of one session; an honest one has as many as it has threads
MAX_NAMESPACES = 256  # of one session
_MOST_PAGE_TOKENS = 1 << 20


def valid_namespace(spec: wire.NamespaceSpec, extent_bytes: int) -> None:
    """Is it well formed, and does its page fit the arena's extents?"""
    if len(spec.digest) != NAMESPACE_BYTES or not 0 <= spec.shard < spec.shards <= MAX_SHARDS:
        raise PeerError("malformed namespace")
    if spec.page_bytes <= 0 or not 0 < spec.page_tokens <= _MOST_PAGE_TOKENS:
        raise PeerError("malformed namespace")
    if len(spec.label) > 256 or len(spec.tenant) > 256 or len(spec.pool) > 64:
        raise PeerError("malformed namespace")
    if len(spec.family) not in (0, NAMESPACE_BYTES):
        raise PeerError("malformed namespace")
    if slots_per_extent(extent_bytes, slot_bytes_for(spec.page_bytes)) == 0:
        raise Refused(
            f"a page of {spec.page_bytes} bytes does not fit an extent of {extent_bytes}",
            "set arena.extent_bytes to at least twice the page, or use a smaller --page-size",
        )


def bounded(session: Session, held: int) -> None:
    """Does it ask for more leases or reservations than anybody needs?"""
    if held >= MAX_HELD:
        raise PeerError(f"{session} holds {MAX_HELD} leases and reservations, and asks for more")


def joined(session: Session, ns: int) -> wire.NamespaceSpec:
    """The session's namespace of that number."""
    if not 0 <= ns < len(session.namespaces):
        raise PeerError(f"namespace {ns} was not joined")
    return session.namespaces[ns]


def keys_of(together: bytes) -> list[bytes]:
    """Page keys that travelled joined."""
    if len(together) % KEY_BYTES or not together or len(together) > wire.MAX_KEYS * KEY_BYTES:
        raise PeerError(f"{len(together)} bytes are not 1..{wire.MAX_KEYS} page keys")
    return [together[at : at + KEY_BYTES] for at in range(0, len(together), KEY_BYTES)]


def valid_ttl(ttl_s: float) -> float:
    """How long a lease may last, in seconds."""
    if not 0 < ttl_s <= MAX_TTL_S:
        raise PeerError(f"a lease of {ttl_s} s: allowed is up to {MAX_TTL_S:.0f}")
    return ttl_s


def valid_wait(wait_s: float) -> None:
    """How long may a reader wait, in seconds?"""
    if not 0 <= wait_s <= MAX_TTL_S:
        raise PeerError(f"a wait of {wait_s} s: allowed is up to {MAX_TTL_S:.0f}")


def valid_prefix(pages: int, parent: bytes) -> None:
    """Can as many pages come before a lookup's, the last of which is `parent`?"""
    if not 0 <= pages <= MAX_CHAIN or len(parent) not in (0, KEY_BYTES):
        raise PeerError("a malformed prefix")
