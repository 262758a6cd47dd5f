"""What a page is worth keeping, by what is known of it: one judge for all page sizes and all tiers of a node. Pure.

A page's *kind* is what its last use told: how often it had been used before, and its `trait`. From a sample of all
pages, resident or not, `reuse` learns for each kind and age a density: expected uses per second of residence. The page
of least density is the one to let go; and a full tier below RAM does not take in what is worth less than all it holds.

Time is a number; a key is an int of 64 well-mixed bits. The same calls give the same answers on every machine.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from kvd.storage.reuse import AGES, Reuse
from kvd.storage.sketch import MOST, Sketch

DEPTHS, _NEWS = 5, 4  # how many steps of each a trait tells apart
TRAITS: Final = DEPTHS * _NEWS * 2
KINDS: Final = (MOST + 1) * TRAITS
PINNED: Final = 255  # told to lower tiers instead of a kind: the page stays
UNKNOWN: Final = 0  # the kind of a page of which nothing is known: a first page, used once
_LEARN_EVERY = 4096  # uses between two lessons


def trait(depth: int, fresh: int, last: bool) -> int:
    """What a request tells about one of its pages, from 0 to before TRAITS.

    `depth`: pages before it in its chain. `fresh`: how many pages of the request had never been seen: few where a
    conversation goes on. `last`: it ends the request, and may be only partly filled.
    """
    steps = (depth > 0) + (depth > 3) + (depth > 15) + (depth > 47)
    news = (fresh > 2) + (fresh > 7) + (fresh > 31)
    return (steps * _NEWS + news) * 2 + last


def depth_of(kind: Any) -> Any:
    """The step of depth of a kind, or of an array of kinds."""
    return kind % TRAITS // (_NEWS * 2)


class Ranks(NamedTuple):
    """One lesson. A line is kind * AGES + age; the least dense has rank 0."""

    density: list[float]  # by line
    by_rank: list[int]  # lines
    rank: list[int]  # by line


class Worth:
    """What has been learnt. `ranks` is replaced by every lesson and never changed."""

    def __init__(self, places: int) -> None:
        """For tiers of about so many pages."""
        self.reuse = Reuse(KINDS)
        self._sketch = Sketch(places)
        self._uses = 0
        self.ranks = _ranks(self.reuse.density)

    def seen(self, key: int) -> bool:
        """Whether the page was used lately, resident or not. Wrongly true for a few keys in a hundred."""
        return self._sketch.count(key) > 0

    def kind(self, key: int, of: int) -> int:
        """The kind of a page with this `trait`, without a use."""
        return self._sketch.count(key) * TRAITS + of

    def use(self, key: int, of: int, now: float) -> int:
        """A page was used, or wanted and missing. `of` is its `trait`. Returns its kind."""
        kind = self._sketch.add(key) * TRAITS + of
        self.reuse.used(key, kind, now)
        self._uses += 1
        return kind

    @property
    def due(self) -> bool:
        """There is enough to learn from."""
        return self._uses >= _LEARN_EVERY

    def lesson(self, now: float) -> Iterator[None]:
        """Learn, in steps of about 1 ms: pages may be used and may leave between them."""
        self._uses = 0
        yield from self.reuse.lesson(now)
        self.ranks = _ranks(self.reuse.density)

    def learn(self, now: float) -> None:
        """A whole lesson at once."""
        for _ in self.lesson(now):
            pass

    def density(self, kind: int, age: int = 0) -> float:
        """Of a page of this kind; `age` as `reuse.age_of` counts it since its last use."""
        return self.ranks.density[kind * AGES + age]


_OLDEST_FIRST: Final = sorted(range(KINDS * AGES), key=lambda line: (-(line % AGES), line))


def _ranks(densities: Sequence[Sequence[float]]) -> Ranks:
    """Among equals the older age comes first."""
    density = [value for ages in densities for value in ages]
    by_rank = sorted(_OLDEST_FIRST, key=density.__getitem__)
    rank = [0] * len(by_rank)
    for at, line in enumerate(by_rank):
        rank[line] = at
    return Ranks(density, by_rank, rank)
