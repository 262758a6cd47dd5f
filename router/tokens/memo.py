"""Texts that were encoded before: of a conversation that goes on, only what is new is encoded. Thread-safe.

A *trunk* is one text up to its last cut, its ids, and the chains of its block hashes. Texts that go on grow the trunk
at its end; one that leaves it earlier starts a trunk of its own from a copy. A trunk is looked for by hashes of the
text's beginnings of some lengths, its *marks*, and then compared byte by byte: what a mark says is never believed.
Bounded: `bytes_limit` counts text, ids, hashes and flat prices; the trunk that was used longest ago leaves, whole.

Always true: a trunk's text and ids never change, they only grow; so what a `Found` says of its beginning stays right.
"""

import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import xxhash

from kvd.router.tokens.blocks import Chain, Naming

MARK_BYTES: Final = 150  # an integer, its entry in the index, its place in the list
CUT_BYTES: Final = 80  # two integers and their places
TRUNK_BYTES: Final = 1000
BLOCK_BYTES: Final = 80  # key, integer and its place in the list
CHAINS: Final = 4  # a trunk keeps; more are namespaces of other tenants, which compute theirs again
_FIRST_MARKS: Final = (256, 512, 1024)  # lengths of beginnings; from there on the multiples of:
_STRIDE: Final = 2048


@dataclass(slots=True, eq=False)
class Trunk:
    """`ends[n]` and `tokens[n]`: where in the text its cut number n is, and how many ids there are up to it."""

    text: bytes = b""
    ends: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ids: "array[int]" = field(default_factory=lambda: array("I"))
    marks: list[int] = field(default_factory=list)
    chains: "OrderedDict[Naming, Chain]" = field(default_factory=OrderedDict)

    @property
    def size_bytes(self) -> int:
        blocks = sum([len(chain.hashes) for chain in self.chains.values()])
        flat = TRUNK_BYTES + CUT_BYTES * len(self.ends) + MARK_BYTES * len(self.marks) + BLOCK_BYTES * blocks
        return flat + len(self.text) + 4 * len(self.ids)

    def cuts_in(self, text: bytes) -> int:
        """Up to how many of its cuts the other text is the same."""
        if text.startswith(self.text):
            return len(self.ends)
        return bisect_left(self.ends, True, key=lambda end: not text.startswith(self.text[:end]))

    def upto(self, cuts: int) -> "Trunk":
        """A trunk of its own that begins with so many cuts of this one; without its marks."""
        ids, end = self.ids[: self.tokens[cuts - 1]], self.ends[cuts - 1]
        chains = OrderedDict(
            (naming, chain.fork(len(ids) // naming.page_tokens)) for naming, chain in self.chains.items()
        )
        return Trunk(self.text[:end], self.ends[:cuts], self.tokens[:cuts], ids, [], chains)


class Found(msgspec.Struct, frozen=True, eq=False):
    """A known beginning of a text: the trunk's first cuts."""

    trunk: Trunk
    cuts: int  # at least one

    @property
    def end(self) -> int:
        """Where in the text the last of them is."""
        return self.trunk.ends[self.cuts - 1]

    @property
    def tokens(self) -> int:
        return self.trunk.tokens[self.cuts - 1]

    def ids(self) -> "array[int]":
        return self.trunk.ids[: self.tokens]


class MemoStats(msgspec.Struct, frozen=True):
    bytes: int
    trunks: int
    marks: int
    found: int
    missed: int
    evicted: int


class Memo:
    """One tokenizer's known texts."""

    def __init__(self, bytes_limit: int) -> None:
        self._limit = bytes_limit
        self._lock = threading.Lock()
        self._trunks: OrderedDict[int, Trunk] = OrderedDict()  # by identity, least recently used first
        self._sizes: dict[int, int] = {}
        self._marked: dict[int, Trunk] = {}  # the last one that had the mark
        self._bytes = self._found = self._missed = self._evicted = 0

    def find(self, text: bytes, marks: Sequence[int]) -> Found | None:
        """A known beginning of a text with these marks; a longer one may be missed where known texts share a mark."""
        with self._lock:
            trunk = next((self._marked[mark] for mark in reversed(marks) if mark in self._marked), None)
            cuts = 0 if trunk is None else trunk.cuts_in(text)
            if trunk is None or not cuts:
                self._missed += 1
                return None
            self._found += 1
            self._trunks.move_to_end(id(trunk))
            return Found(trunk, cuts)

    def grow(
        self, found: Found | None, text: bytes, marks: Sequence[int],
        ends: Sequence[int], pieces: "Sequence[array[int]]",
    ) -> Found | None:  # fmt: skip
        """What follows a known beginning: the further cuts, and the ids up to each since the one before.

        Returns the longest beginning that is known now: `found` itself where there are no further cuts.
        """
        if not ends:
            return found
        with self._lock:
            before = found.cuts if found is not None else 0
            trunk = found.trunk if found is not None else Trunk()
            whole = before + len(ends)
            if len(trunk.ends) > before and trunk.cuts_in(text) >= whole:
                return Found(trunk, whole)  # somebody else encoded the same meanwhile
            if found is not None and (len(trunk.ends) > before or id(trunk) not in self._trunks):
                trunk = trunk.upto(before)
            trunk.text = text[: ends[-1]]
            trunk.ends += ends
            for ids in pieces:
                trunk.ids += ids
                trunk.tokens.append(len(trunk.ids))
            self._mark(trunk, marks)
            self._account(trunk)
            return Found(trunk, whole)

    def hashes(self, found: Found | None, ids: "array[int]", naming: Naming) -> list[int]:
        """Event hashes of `ids`, which begin with what was found; the trunk remembers its own."""
        trunk = found.trunk if found is not None else Trunk()
        shared = found.tokens // naming.page_tokens if found is not None else 0
        with self._lock:
            known = trunk.chains.get(naming)
            if known is not None and len(known.hashes) >= shared == len(ids) // naming.page_tokens:
                return known.hashes[:shared]
            chain = known.fork(shared) if known is not None else Chain(naming)
        new = len(chain.hashes) < shared
        chain.extend(ids)  # not under the lock: of a long text it takes seconds, and event loops wait for the lock
        if new:
            with self._lock:
                self._keep(trunk, chain.fork(shared))
        return chain.hashes

    def stats(self) -> MemoStats:
        with self._lock:
            return MemoStats(
                self._bytes, len(self._trunks), len(self._marked), self._found, self._missed, self._evicted
            )

    def faults(self) -> list[str]:
        """Broken invariants; empty unless this code is wrong."""
        with self._lock:
            faults = []
            trunks = self._trunks.values()
            if self._bytes != sum(trunk.size_bytes for trunk in trunks):
                faults.append("the bytes are not the trunks'")
            if self._bytes > self._limit:
                faults.append("more bytes than allowed")
            if any(mark not in trunk.marks or id(trunk) not in self._trunks for mark, trunk in self._marked.items()):
                faults.append("a mark of a trunk that is gone, or has it not")
            if any(trunk.tokens[-1:] != [len(trunk.ids)] or trunk.ends[-1:] != [len(trunk.text)] for trunk in trunks):
                faults.append("a trunk that does not end at its last cut")
            return faults

    def _keep(self, trunk: Trunk, chain: Chain) -> None:
        """As the trunk's own, counted; unless somebody else's goes further."""
        known = trunk.chains.get(chain.naming)
        if known is not None and len(known.hashes) >= len(chain.hashes):
            return
        trunk.chains[chain.naming] = chain
        if len(trunk.chains) > CHAINS:
            trunk.chains.popitem(last=False)
        if id(trunk) in self._trunks:
            self._account(trunk)

    def _mark(self, trunk: Trunk, marks: Sequence[int]) -> None:
        """With those of its text's marks that lie within it; what another trunk had becomes this one's."""
        new = marks[len(trunk.marks) : _within(len(trunk.text))]
        trunk.marks += new
        for mark in new:
            self._marked[mark] = trunk

    def _account(self, trunk: Trunk) -> None:
        """Counts the trunk anew, last used now; others leave until all fit. One that is too large does not stay."""
        self._trunks[id(trunk)] = trunk
        self._trunks.move_to_end(id(trunk))
        size = trunk.size_bytes
        self._bytes += size - self._sizes.get(id(trunk), 0)
        self._sizes[id(trunk)] = size
        while self._bytes > self._limit:
            gone, old = self._trunks.popitem(last=False)
            self._bytes -= self._sizes.pop(gone)
            for mark in old.marks:
                if self._marked.get(mark) is old:
                    del self._marked[mark]
            self._evicted += 1


def marks(text: bytes) -> list[int]:
    """64-bit hashes of a text's beginnings, in one pass over it; so many as lie within it."""
    state, found, begin, view = xxhash.xxh3_64(), [], 0, memoryview(text)
    for end in (*_FIRST_MARKS, *range(_STRIDE, len(text) + 1, _STRIDE)):
        if end > len(text):
            break
        state.update(view[begin:end])
        found.append(state.intdigest())
        begin = end
    return found


def _within(length: int) -> int:
    """How many marks lie within a beginning of this length."""
    return sum(length >= first for first in _FIRST_MARKS) + length // _STRIDE
