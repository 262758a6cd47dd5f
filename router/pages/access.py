"""Who may see and change what of the router itself. Pure.

Health and metrics are everybody's. Where keys are set, the rest is for tenants with `admin`. Where none are set,
everybody may look, as everybody may use every endpoint of the workers; but only who is on this machine may change who
the workers are, and nobody through a proxy, behind which everybody is on this machine, or from a browser's page.
"""

from ipaddress import IPv6Address, ip_address
from typing import Final

from kvd.router.proxy.strict import Head, Malformed
from kvd.router.tenants import Tenant

MOST_BODY_BYTES: Final = 4096
_FROM_ELSEWHERE: Final = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip", b"origin"})


def admit(head: Head, tenant: Tenant | None, keys: bool, peer: str, changes: bool) -> None:
    """To a page that is not everybody's. `tenant`: None for a stranger; `keys`: whether any are set; `peer`: whose
    address it is; `changes`: whether the page changes something. Raises Malformed with 401, 403 or 413."""
    if tenant is None:
        raise Malformed(401, "no known API key: send it as `authorization: Bearer KEY`, with kvdctl as KVD_ROUTER_KEY")
    if not tenant.admin:
        raise Malformed(403, f"{head.path} is for administrators: their keys have `admin = true` in the file of keys")
    if changes and not keys:
        if not is_loopback(peer):
            raise Malformed(403, "without API keys workers are changed from the router's own machine only: set keys")
        if elsewhere := sorted(name.decode() for name, _ in head.fields if name in _FROM_ELSEWHERE):
            raise Malformed(
                403, f"with {elsewhere[0]} nobody knows who asks: set API keys, or ask the router directly"
            )
    if head.chunked or head.length > MOST_BODY_BYTES:
        raise Malformed(413, f"{head.path} takes at most {MOST_BODY_BYTES} bytes, with a content-length")


def is_loopback(peer: str) -> bool:
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
