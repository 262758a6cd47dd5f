"""Prefixes that were encoded before: of a conversation that goes on, only what is new is encoded. Thread-safe.

A *trunk* is the ids of one text up to its last cut, and the chains of its block hashes. Texts that go on grow the
trunk at its end; one that leaves it earlier starts a trunk of its own from a copy. A trunk is found by the digest of
any of its prefixes at a cut. Bounded: `bytes_limit` counts ids, hashes and a flat price per prefix; the trunk that was
used longest ago leaves, whole.

Always true: a trunk's ids never change, they only grow; so what a `Found` says of its first ids stays right.
"""

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import xxhash

from kvd.router.tokens.blocks import Chain, Naming

PREFIX_BYTES: Final = 200  # a digest, its place in the dictionary, its entry
TRUNK_BYTES: Final = 1000
BLOCK_BYTES: Final = 80  # key, integer and its place in the list
CHAINS: Final = 4  # a trunk keeps; more are namespaces of other tenants, which compute theirs again


@dataclass(slots=True, eq=False)
class Trunk:
    ids: "array[int]" = field(default_factory=lambda: array("I"))
    digests: list[int] = field(default_factory=list)
    chains: "OrderedDict[Naming, Chain]" = field(default_factory=OrderedDict)

    @property
    def bytes(self) -> int:
        blocks = sum(len(chain.hashes) for chain in self.chains.values())
        return TRUNK_BYTES + 4 * len(self.ids) + PREFIX_BYTES * len(self.digests) + BLOCK_BYTES * blocks


@dataclass(frozen=True, slots=True)
class Found:
    """The longest known prefix of a text: the trunk's first `tokens` ids, up to the text's cut number `cuts`."""

    trunk: Trunk
    tokens: int
    cuts: int

    def ids(self) -> "array[int]":
        return self.trunk.ids[: self.tokens]


@dataclass(frozen=True, slots=True)
class MemoStats:
    bytes: int
    trunks: int
    prefixes: int
    found: int
    missed: int
    evicted: int


class Memo:
    """One tokenizer's known prefixes."""

    def __init__(self, bytes_limit: int) -> None:
        self._limit = bytes_limit
        self._lock = threading.Lock()
        self._trunks: OrderedDict[int, Trunk] = OrderedDict()  # by identity, least recently used first
        self._sizes: dict[int, int] = {}
        self._prefixes: dict[int, tuple[Trunk, int]] = {}
        self._bytes = self._found = self._missed = self._evicted = 0

    def find(self, digests: Sequence[int]) -> Found | None:
        """By the digests of a text's prefixes, in order."""
        with self._lock:
            for at in range(len(digests) - 1, -1, -1):
                held = self._prefixes.get(digests[at])
                if held is not None:
                    self._found += 1
                    self._trunks.move_to_end(id(held[0]))
                    return Found(held[0], held[1], at + 1)
            self._missed += 1
            return None

    def grow(self, found: Found | None, new: Iterable[tuple[int, Sequence[int]]]) -> Found | None:
        """What follows a known prefix: for each further cut its digest and the ids since the cut before.

        Returns the longest prefix that is known now: `found` itself where nothing is new.
        """
        steps = list(new)
        if not steps:
            return found
        with self._lock:
            held = self._prefixes.get(steps[-1][0])
            if held is not None:  # somebody else encoded the same meanwhile
                return Found(*held, (found.cuts if found else 0) + len(steps))
            trunk = self._trunk_for(found)
            before = 0 if found is None else found.cuts
            for digest, ids in steps:
                trunk.ids.extend(ids)
                if digest not in self._prefixes:
                    self._prefixes[digest] = trunk, len(trunk.ids)
                    trunk.digests.append(digest)
            grown = Found(trunk, len(trunk.ids), before + len(steps))
            self._account(trunk)
            return grown

    def hashes(self, found: Found | None, ids: "array[int]", naming: Naming) -> list[int]:
        """Event hashes of `ids`, which begin with what was found; the trunk remembers its own."""
        if found is None:
            chain = Chain(naming)
        else:
            with self._lock:
                known = found.trunk.chains.get(naming)
                before = None if known is None else len(known.hashes)
                if known is None:
                    known = found.trunk.chains[naming] = Chain(naming)
                    if len(found.trunk.chains) > CHAINS:
                        found.trunk.chains.popitem(last=False)
                known.extend(found.trunk.ids)
                chain = known.fork(found.tokens // naming.page_tokens)
                if len(known.hashes) != before and id(found.trunk) in self._trunks:
                    self._account(found.trunk)
        chain.extend(ids)
        return chain.hashes

    def stats(self) -> MemoStats:
        with self._lock:
            return MemoStats(
                self._bytes, len(self._trunks), len(self._prefixes), self._found, self._missed, self._evicted
            )

    def faults(self) -> list[str]:
        """Broken invariants; empty unless this code is wrong."""
        with self._lock:
            faults = []
            if self._bytes != sum(trunk.bytes for trunk in self._trunks.values()):
                faults.append("the bytes are not the trunks'")
            if self._bytes > self._limit:
                faults.append("more bytes than allowed")
            if sum(len(trunk.digests) for trunk in self._trunks.values()) != len(self._prefixes):
                faults.append("prefixes without a trunk, or the other way round")
            return faults

    def _trunk_for(self, found: Found | None) -> Trunk:
        """The trunk to grow: the one that ends there, or a new one that begins with a copy."""
        if found is not None and len(found.trunk.ids) == found.tokens and id(found.trunk) in self._trunks:
            return found.trunk
        trunk = Trunk()
        if found is not None:
            trunk.ids.extend(found.ids())
            for naming, chain in found.trunk.chains.items():
                trunk.chains[naming] = chain.fork(found.tokens // naming.page_tokens)
        return trunk

    def _account(self, trunk: Trunk) -> None:
        """Counts the trunk anew, last used now; others leave until all fit. One that is too large does not stay."""
        self._trunks[id(trunk)] = trunk
        self._trunks.move_to_end(id(trunk))
        size = trunk.bytes
        self._bytes += size - self._sizes.get(id(trunk), 0)
        self._sizes[id(trunk)] = size
        while self._bytes > self._limit:
            gone, old = self._trunks.popitem(last=False)
            self._bytes -= self._sizes.pop(gone)
            for digest in old.digests:
                del self._prefixes[digest]
            self._evicted += 1


def digests(data: bytes, ends: Sequence[int]) -> list[int]:
    """128-bit digests of a text's prefixes, in one pass over it."""
    state, found, begin = xxhash.xxh3_128(), [], 0
    for end in ends:
        state.update(memoryview(data)[begin:end])
        found.append(state.intdigest())
        begin = end
    return found
