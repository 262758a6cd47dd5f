"""From the sealed slots that a previous daemon left to whole pages. Pure."""

from collections.abc import Iterable

from kvd.pages import NAMESPACE_BYTES
from kvd.storage.arena import Header

Part = tuple[int, Header]


def whole_pages(found: Iterable[Part]) -> tuple[list[tuple[Header, tuple[int, ...]]], list[int]]:
    """(pages with their slots by shard, every parent before its children; slots that belong to no whole page)."""
    shards: dict[bytes, dict[int, Part]] = {}
    spare: list[int] = []
    for slot, header in found:
        parts = shards.setdefault(header.namespace + header.key, {})
        if header.shard in parts or not 0 <= header.shard < header.shards:
            spare.append(slot)
        else:
            parts[header.shard] = (slot, header)
    whole: dict[bytes, list[Part]] = {}
    for name, parts in shards.items():
        ordered = [parts[shard] for shard in sorted(parts)]
        first = ordered[0][1]
        if all((h.shards, h.length, h.parent) == (len(ordered), first.length, first.parent) for _, h in ordered):
            whole[name] = ordered
        else:
            spare += [slot for slot, _ in ordered]
    pages: list[tuple[Header, tuple[int, ...]]] = []
    for start in list(whole):
        chain: dict[bytes, None] = {}  # ordered; and a header that lies about its parent may make a ring
        name = start
        while name in whole and name not in chain:
            chain[name] = None
            name = name[:NAMESPACE_BYTES] + whole[name][0][1].parent
        for link in reversed(chain):
            ordered = whole.pop(link)
            pages.append((ordered[0][1], tuple(slot for slot, _ in ordered)))
    return pages, spare
