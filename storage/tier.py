"""What a tier below RAM is: pages outlive the daemon there, and come back exactly or not at all.

A tier keeps whole page groups, all shards of a page together, under their *name*: namespace (16 bytes) and page key
(32 bytes). It is synchronous and thread-safe; `kvd.storage.serve` runs it in a process of its own, so that a disk that
hangs, or kills who reads it, takes nobody along.

    put     durable when it returns: a page marked True survives kill -9 and power loss, whole and right
    get     the bytes that were put, checked against their checksums, or None; a page found damaged is gone for good
    find    what `get` would bring, without reading payloads; may be wrong about damage and nothing else
    remove  gone when it returns, also after a crash
    tend    what is due: what is past its time goes, others' pages are looked for; may take as long as many puts
    news    names that came or left without the caller's doing: evicted, damaged, stored or removed by another node
    judge, used    hints at what is worth keeping; a tier that has an order of its own ignores them
    belongs, held  whose pages are whose, for a tier that knows shares

A tier may drop any page at any time (it is a cache) and says so in `news`. It never gives back bytes of another page.
What the medium does (full, broken, slow, gone) is a `TierError`, or False and None for the pages concerned.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from kvd.errors import KvdError

Name = bytes  # namespace + page key
NAME_BYTES = 48


class TierError(KvdError):
    """The tier cannot work at the moment: its disk is full, broken or not there."""


class WriteRefused(TierError):
    """The medium may be read, and not be written: nothing changed, and the tier goes on."""


class Page(NamedTuple):
    """A page group without its bytes."""

    namespace: bytes
    key: bytes
    parent: bytes  # 32 zero bytes: the first page of a chain
    length: int  # payload bytes of one shard
    checksums: tuple[bytes, ...]  # xxh3-128 of each shard's payload, shard 0 first
    tokens: int = 0  # that one page stands for
    kind: int = 0  # what is known of its worth: kvd.storage.worth

    @property
    def name(self) -> Name:
        return self.namespace + self.key

    @property
    def shards(self) -> int:
        return len(self.checksums)


# One buffer per shard, shard 0 first. A buffer has the shard's length rounded up to 4096 bytes; what is beyond the
# length is anybody's. Buffers that begin at a multiple of 4096 (the arena's do) are moved without a copy.
Buffers = Sequence[memoryview]


class Usage(NamedTuple):
    """How full a tier is. Bytes are of the medium, as far as this tier may use it."""

    pages: int
    bytes_used: int
    bytes_total: int


class News(NamedTuple):
    """What changed without the caller's doing since the last call."""

    came: list[Name]
    left: list[Name]


class Tier(Protocol):
    """Raises TierError from any method when the tier as a whole cannot work."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What happened since it was opened, for operators."""
        ...

    def put(self, pages: Sequence[tuple[Page, Buffers]]) -> list[bool]:
        """Store pages; True for each that is held durably now (also if it was before). False: no room, not wanted."""
        ...

    def find(self, names: Sequence[Name]) -> list[Page | None]: ...

    def get(self, wanted: Sequence[tuple[Name, Buffers]]) -> list[Page | None]:
        """Fill the buffers. None for what is absent, damaged, or of other sizes; these hold anything then."""
        ...

    def remove(self, names: Sequence[Name]) -> None:
        """Forget pages; names that are not held are ignored. Raises WriteRefused where all stay."""
        ...

    def names(self) -> Iterator[list[Name]]:
        """All names held, in pieces, so that 10**6 of them need not exist at once."""
        ...

    def tend(self) -> None:
        """To be called now and then, by one thread. What comes of it is in the news."""
        ...

    def news(self) -> News:
        """At once: stores wait meanwhile."""
        ...

    def judge(self, density: Sequence[float]) -> None:
        """What was learnt: a density for each kind and age, see kvd.storage.worth."""
        ...

    def used(self, pages: Sequence[tuple[Name, int]]) -> None:
        """Pages were used elsewhere, and are of these kinds now."""
        ...

    def belongs(self, namespace: bytes, tenant: str) -> None:
        """The pages of this namespace are that tenant's."""
        ...

    def held(self) -> dict[str, int]:
        """Bytes of each tenant that has a share here."""
        ...

    @property
    def floor(self) -> float | None:
        """A page of less density than this would only push out better ones; None: the tier cannot tell."""
        ...

    def usage(self) -> Usage: ...

    def close(self) -> None:
        """May be called twice."""
        ...
