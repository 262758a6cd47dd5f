"""What `kvdctl` asks beside status: the gate's decisions, where pages are, evictions. Changes RAM only.

What looks at all pages does so in parts, so that workers wait milliseconds. Raises PeerError.
"""

import re
from collections.abc import Sequence
from typing import Final

from kvd import wire
from kvd.daemon.below import Below
from kvd.daemon.eviction import Selection, evict_part
from kvd.daemon.gate import WORDS
from kvd.daemon.group import NO_PARENT
from kvd.daemon.node import Node
from kvd.errors import PeerError
from kvd.pages import KEY_BYTES, NAMESPACE_BYTES
from kvd.storage.tier import Name

_FIND_AT_ONCE: Final = 16384  # page ids: some 5 ms
_MOST_FOUND: Final = 64
_HEAD: Final = re.compile(r"[0-9a-f]{1,64}")


def answer(node: Node, lower: Sequence[Below], request: wire.ToDaemon, now: float) -> wire.FromDaemon:
    """The reply to a request that is answered at once."""
    match request:
        case wire.GetDecisions(limit):
            return _decisions(node, lower, limit, now)
        case wire.FindPages():
            return _find(node, request)
        case wire.GetNamespace(digest):
            return wire.NamespaceKnown(node.labels.get(digest))
        case wire.GetChain(namespace, key):
            return _chain(node, namespace, key)
        case wire.EvictPages():
            if request.cursor < 0:
                raise PeerError("malformed eviction")
            return evict_part(node.stock, node.sessions, Selection.of(request), request.cursor, now)
        case wire.GetPins():
            rows = [_one_pin(node, *pin) for pin in node.pins.listed()]
            return wire.Pins(rows, node.pins.bytes_in_ram, node.pins.limit)
        case wire.GetQuotas():
            return wire.Quotas(_shares(node, lower))
    raise PeerError(f"{type(request).__name__} is not for operators")


def _decisions(node: Node, lower: Sequence[Below], limit: int, now: float) -> wire.Decisions:
    names = {tier.bit: below.name for tier, below in zip(node.promotion.tiers, lower, strict=True)}
    rows = [
        wire.GateDecision(
            now - made.at, made.session, made.pid, made.worker, made.pool, names[made.tier],
            made.decision.wanted, made.decision.pages, made.decision.disk_bytes_per_s,
            made.decision.bytes_on_the_way, made.decision.prefill_tokens_per_s, made.decision.page_bytes,
            made.decision.page_tokens, made.decision.reason, WORDS[made.decision.reason],
        )
        for made in node.reading.decisions.last(limit)
    ]  # fmt: skip
    return wire.Decisions(rows, node.reading.decisions.total, list(names.values()))


def _find(node: Node, request: wire.FindPages) -> wire.PagesFound:
    """A whole key is also found in lower tiers, in the namespaces that workers have named since kvd started."""
    head, namespace, cursor = request.head, request.namespace, request.cursor
    if not _HEAD.fullmatch(head) or len(namespace) not in (0, NAMESPACE_BYTES) or cursor < 0:
        raise PeerError("malformed search")
    found: list[wire.PageName] = []
    if len(head) == 2 * KEY_BYTES and cursor == 0:
        key = bytes.fromhex(head)
        digests = [namespace] if namespace else node.labels.digests()
        found += [wire.PageName(digest, key) for digest in digests if node.stock.below(digest, key)]
    start = bytes.fromhex(head[: len(head) & ~1])
    last = min(cursor + _FIND_AT_ONCE, node.residency.last_id + 1)
    for group in map(node.residency.by_id, range(cursor, last)):
        if group is None or not group.key.startswith(start) or namespace not in (b"", group.namespace):
            continue
        if group.key.hex().startswith(head):
            found.append(wire.PageName(group.namespace, group.key))
    return wire.PagesFound(found[:_MOST_FOUND], last if last <= node.residency.last_id else -1)


def _one_pin(node: Node, tip: Name, pages: int, in_ram: int) -> wire.OnePin:
    namespace, key = tip[:NAMESPACE_BYTES], tip[NAMESPACE_BYTES:]
    spec = node.labels.get(namespace)
    return wire.OnePin(namespace, key, pages, in_ram, f"{spec.label} {spec.pool}" if spec else "")


def _shares(node: Node, lower: Sequence[Below]) -> list[wire.TenantShare]:
    quotas = node.stock.quotas
    found = [
        wire.TenantShare(tenant, "ram", quotas.held(tenant), share.reserve_bytes, share.burst_bytes)
        for tenant in quotas.tenants()
        for share in [quotas.share(tenant)]
    ]
    for below in lower:
        for tenant, held in below.gauge.held.items():
            found.append(wire.TenantShare(tenant, below.name, held, *below.shares[tenant]))
    return found


def _chain(node: Node, namespace: bytes, key: bytes) -> wire.Chain:
    found = node.residency.lineage(namespace, key)
    missing = found[0].parent_key if found and found[0].parent_key != NO_PARENT else b""
    return wire.Chain(b"".join(group.key for group in found), missing)
