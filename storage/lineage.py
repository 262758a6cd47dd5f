"""Which pages of a tier a removal means: a page and all that follow it, a namespace, or everything.

A key names the same prompt in every namespace, and what follows it is found by keys alone: so the side pools of a
model are found too, whose pages do not name their parents. A tier knows each page's parent, not its children; all
pages are read once and joined as arrays, some 100 bytes a page.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from kvd.pages import KEY_BYTES, NAMESPACE_BYTES
from kvd.storage.tier import NAME_BYTES, Name, Tier

_PIECE: Final = 1 << 14  # names removed at once: a transaction, or a file of graves

_Keys = npt.NDArray[np.bytes_]  # of 32 bytes, zeros at the end cut off: that makes no two of them equal


def meant(tier: Tier, namespace: bytes, key: bytes) -> Iterator[list[Name]]:
    """Their names, in pieces. An empty namespace is every one, an empty key every page. Raises TierError."""
    names, parents = bytearray(), bytearray()
    for piece in tier.names():
        mine = [name for name in piece if name.startswith(namespace)]
        for name, page in zip(mine, tier.find(mine) if key else [None] * len(mine), strict=True):
            names += name
            parents += page.parent if page else bytes(KEY_BYTES)
    chosen: range | list[int] = range(0, len(names) // NAME_BYTES)
    if key:
        chosen = following(key, _keys(names), np.frombuffer(bytes(parents), f"S{KEY_BYTES}"))
    for at in range(0, len(chosen), _PIECE):
        yield [bytes(names[NAME_BYTES * n : NAME_BYTES * (n + 1)]) for n in chosen[at : at + _PIECE]]


def _keys(names: bytearray) -> _Keys:
    rows = np.frombuffer(bytes(names), np.uint8).reshape(-1, NAME_BYTES)[:, NAMESPACE_BYTES:]
    return np.ascontiguousarray(rows).view(f"S{KEY_BYTES}").reshape(-1)


def following(key: bytes, keys: _Keys, parents: _Keys) -> list[int]:
    """Rows of the pages that have this key, or a chain of parents that leads to it."""
    order = np.argsort(parents, kind="stable")
    sorted_parents = parents[order]
    found = np.zeros(len(keys), bool)
    level = np.array([key], keys.dtype)
    while len(level):
        begin, end = (np.searchsorted(sorted_parents, level, side) for side in ("left", "right"))
        spans = [order[b:e] for b, e in zip(begin, end, strict=True) if e > b]
        children = np.concatenate(spans) if spans else order[:0]
        children = children[~found[children]]  # all of them, unless a lying record makes a ring
        found[children] = True
        level = np.unique(keys[children])
    meant_keys = np.append(keys[found], np.array([key], keys.dtype))
    return [int(row) for row in np.flatnonzero(np.isin(keys, meant_keys))]
