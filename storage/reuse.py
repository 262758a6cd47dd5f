"""When pages come back: learnt from a sample of all pages seen, resident or not. Pure: time is a number.

A page's `kind` is what is known of it when it is used. Per kind, and per age since that use on a scale that doubles,
the sample counts how many pages reached the age and how many were used again there: a hazard. From it follows the
density: the most uses per second of residence that keeping the page can still earn, over all times to give up at
(its Gittins index). The page of least density is the one to let go.

Always true: what was evicted is observed as long as what stayed, so the choice of victims does not colour what is
learnt; the sample is bounded, and when it is full every second page leaves it, by key.
"""

from collections.abc import Iterator

AGES = 16  # age b lies in [2**b - 1, 2**(b+1) - 1) seconds; the last one is open
_STARTS = tuple(2.0**b - 1 for b in range(AGES + 1))
_LENGTHS = tuple(2.0**b for b in range(AGES))
# With how many observations of the average kind each kind begins, and what the average begins with: the same chance
# to return in every doubling of the age. Alone that makes the density fall with age, which is the LRU order.
_PRIOR_PAGES = 8.0
_PRIOR_HAZARD = 0.02
_AT_ONCE = 10  # kinds in one step of a lesson
_FADE = 0.9  # of all counts, each `_FADE_EVERY` lessons: habits change
_FADE_EVERY = 10
_MIX = 0xFF51AFD7ED558CCD  # of MurmurHash3: spreads keys that are small numbers
_WORD = (1 << 64) - 1


def age_of(seconds: float) -> int:
    """On which step of the scale an age lies."""
    return min(int(seconds + 1).bit_length() - 1, AGES - 1) if seconds > 0 else 0


class Reuse:
    """What a sample of pages tells about when each kind comes back."""

    def __init__(self, kinds: int, sample: int = 1 << 15) -> None:
        self._sample = sample
        self._shift = 0  # one of 2**shift pages is watched
        self._lessons = 0
        self._reached = [[0.0] * AGES for _ in range(kinds)]
        self._returned = [[0.0] * AGES for _ in range(kinds)]
        # Watched pages by the age they have reached, and in it by last use: key -> (when used, kind).
        self._watched: list[dict[int, tuple[float, int]]] = [{} for _ in range(AGES)]
        self._where: dict[int, int] = {}  # key -> index in _watched
        first = _density(self._pooled())
        self.density = [first] * kinds

    def used(self, key: int, kind: int, now: float) -> None:
        """A page was used: an answer to the question that its last use asked, and a new question."""
        if self._shift and (key * _MIX & _WORD) >> (64 - self._shift):
            return
        was_at = self._where.get(key)
        if was_at is not None:
            since, before = self._watched[was_at].pop(key)
            age = age_of(now - since)
            reached = self._reached[before]
            for passed in range(was_at + 1, age + 1):
                reached[passed] += 1
            self._returned[before][age] += 1
        self._reached[kind][0] += 1
        self._watched[0][key] = (now, kind)
        self._where[key] = 0
        if len(self._where) > self._sample:
            self._thin()

    def lesson(self, now: float) -> Iterator[None]:
        """Move the sample on to the ages it has reached, and work out the densities again; in steps of about 1 ms."""
        for age in range(AGES - 2, -1, -1):  # the oldest first: so each age stays in the order of last use
            self._grow_older(age, now)
            yield
        self._lessons += 1
        if self._lessons % _FADE_EVERY == 0:
            self._scale(_FADE)
        average = self._pooled()
        unknown, found = _density(average), list[tuple[float, ...]]()
        for number, (returned, reached) in enumerate(zip(self._returned, self._reached, strict=True)):
            found.append(_density(_hazard(returned, reached, average)) if any(reached) else unknown)
            if number % _AT_ONCE == 0:
                yield
        self.density = found

    def learn(self, now: float) -> None:
        """A whole lesson at once."""
        for _ in self.lesson(now):
            pass

    def __len__(self) -> int:
        return len(self._where)

    def _grow_older(self, age: int, now: float) -> None:
        here, born_before = self._watched[age], now - _STARTS[age + 1]
        moving: list[int] = []
        for key, (since, kind) in here.items():
            if since > born_before:
                break
            older = age_of(now - since)
            reached = self._reached[kind]
            for passed in range(age + 1, older + 1):
                reached[passed] += 1
            self._watched[older][key] = (since, kind)
            self._where[key] = older
            moving.append(key)
        for key in moving:
            del here[key]

    def _thin(self) -> None:
        self._shift += 1
        for watched in self._watched:
            for key in [key for key in watched if (key * _MIX & _WORD) >> (64 - self._shift)]:
                del watched[key], self._where[key]
        self._scale(0.5)  # a page counts for two from now on

    def _scale(self, factor: float) -> None:
        for counts in (self._reached, self._returned):
            for row in counts:
                row[:] = [count * factor for count in row]

    def _pooled(self) -> list[float]:
        returned = [sum(column) for column in zip(*self._returned, strict=True)]
        reached = [sum(column) for column in zip(*self._reached, strict=True)]
        return _hazard(returned, reached, [_PRIOR_HAZARD] * AGES)


def _hazard(returned: list[float], reached: list[float], prior: list[float]) -> list[float]:
    return [
        min(1.0, (back + _PRIOR_PAGES * before) / (seen + _PRIOR_PAGES))
        for back, seen, before in zip(returned, reached, prior, strict=True)
    ]


def _density(hazard: list[float]) -> tuple[float, ...]:
    """The index of each age: the best ratio of uses to seconds over all later ages to stop at.

    From the oldest age back, each age takes in those after it as long as they raise its ratio.
    """
    later: list[_Span] = []
    found = [0.0] * AGES
    for age in range(AGES - 1, -1, -1):
        chance = hazard[age]
        length = _LENGTHS[age] * (1 - chance / 2)
        # A page found at this age is somewhere within it: half of its time is still to come.
        uses, seconds, _ = _extended((chance, length / 2, 1 - chance), list(later))
        found[age] = uses / seconds
        later.append(_extended((chance, length, 1 - chance), later))
    return tuple(found)


_Span = tuple[float, float, float]  # expected uses, expected seconds, and the share that is left after it


def _extended(span: _Span, later: list[_Span]) -> _Span:
    """The span with what follows it, as long as that raises its ratio; takes those off the list."""
    uses, seconds, left = span
    while later and later[-1][0] * seconds > uses * later[-1][1]:
        more, longer, stay = later.pop()
        uses, seconds, left = uses + left * more, seconds + left * longer, left * stay
    return uses, seconds, left
