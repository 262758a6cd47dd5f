"""The lookup index: one shared-memory hash table that the daemon writes and every worker reads without a message.

Little-endian, native 64-bit words:

    header (64 bytes)  [magic u64][version u64][epoch u64][entries u64][moves u64][0 u64 x 3]
    entry  (32 bytes)  [name_hi u64][name_lo u64][place u64][depth u64]

`name` is (page key XOR namespace), first 16 bytes. name_hi 0 is an entry never used, 1 one that was withdrawn.
`place` is the page group's (id << 32 | generation): what a lease names. For a page that is not in RAM it is LOWER and
a bit for each tier below that has it: kvd must be asked, and begins to fetch it then. `depth` counts ancestors that
are certain to be resident together with this page: eviction is leaf first, so they outlive it.

One writer. name_hi is stored last on publish and cleared first on withdraw, each one aligned 8-byte store, and a
reader looks at it again after reading the rest. A reader may therefore miss a page that is just coming or
moving; it never takes one page for another (16 bytes of SHA-256; and `get` compares all 32).
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kvd.pages import NAMESPACE_BYTES

MAGIC: Final = int.from_bytes(b"KVDINDEX", "little")
VERSION: Final = 1
HEADER_WORDS: Final = 8
ENTRY_WORDS: Final = 4
WITHDRAWN: Final = 1
LOWER: Final = 1 << 63
MAX_PROBES: Final = 128
_MANY: Final = 48  # names, from which on arrays are faster than one name after the other
_STRIDE: Final = 2654435769  # odd, so that the hand visits every entry


def index_bytes(entries: int) -> int:
    """Size of an index with this many entries (a power of two)."""
    return 8 * (HEADER_WORDS + ENTRY_WORDS * entries)


def entries_for(groups: int) -> int:
    """A power of two that keeps the table at most half full with `groups` pages."""
    return max(1024, 1 << (2 * groups - 1).bit_length())


class Match(NamedTuple):
    """`pages` leading pages are resident; holding the groups in `tips` holds them all."""

    pages: int
    tips: tuple[int, ...]

    @property
    def lower(self) -> bool:
        """Some of them are not in RAM."""
        return any(tip & LOWER for tip in self.tips)


class Name(NamedTuple):
    """A namespace as the index mixes it into keys."""

    hi: int
    lo: int

    @classmethod
    def of(cls, namespace: bytes) -> "Name":
        return cls(int.from_bytes(namespace[:8], "big"), int.from_bytes(namespace[8:16], "big"))


class IndexReader:
    """Read side. Raises ValueError where the memory is not an index of this version."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory.cast("Q")
        if self._words[0] != MAGIC or self._words[1] != VERSION:
            raise ValueError("not a kvd index of version 1")
        self._mask = self._words[3] - 1
        if index_bytes(self._mask + 1) > len(memory) or self._mask & (self._mask + 1):
            raise ValueError("kvd index is cut short")

    def find(self, hi: int, lo: int) -> tuple[int, int] | None:
        """(place, depth) of a name, or None."""
        words, mask = self._words, self._mask
        slot = hi & mask
        if hi <= WITHDRAWN:
            hi += 2
        for _ in range(MAX_PROBES):
            at = HEADER_WORDS + ENTRY_WORDS * slot
            seen = words[at]
            if seen == hi and words[at + 1] == lo:
                place, depth = words[at + 2], words[at + 3]
                if words[at] == hi:
                    return place, depth
            if seen == 0:
                return None
            slot = (slot + 1) & mask
        return None

    def leading(self, name: Name, keys: Sequence[str]) -> Match:
        """How many leading pages of a chain (hex keys) are resident, in O(runs x log pages) probes.

        A probe that hits proves its `depth` ancestors too; what it does not reach is probed on its own, so a
        hole left by an out-of-order arrival is found, never assumed away.
        """

        def probe(position: int) -> tuple[int, int] | None:
            key = keys[position]
            return self.find(int(key[:16], 16) ^ name.hi, int(key[16:32], 16) ^ name.lo)

        return leading_run(len(keys), probe)

    def present(self, name: Name, key: str) -> int | None:
        """The place of one page, or None."""
        found = self.find(int(key[:16], 16) ^ name.hi, int(key[16:32], 16) ^ name.lo)
        return None if found is None else found[0]


def leading_run(count: int, probe: Callable[[int], tuple[int, int] | None]) -> Match:
    """Longest proven prefix of a chain. `probe(i)` is (place, proven ancestors) or None.

    The first page, then the last, then bisection: nothing held takes one probe, all held takes two.
    """
    proven, absent = 0, count
    tips: list[int] = []
    at = 0
    while proven < absent:
        found = probe(at)
        if found is None:
            absent = at
        else:
            place, depth = found
            older = at - depth - 1  # not proven by this page
            run = _prove(older, proven, probe) if older >= proven else ([], older >= 0)
            if isinstance(run, int):
                absent = run
            else:
                tips = [*(tips if run[1] else ()), place, *run[0]]
                proven = at + 1
        at = (proven + absent) // 2 if at else absent - 1
    return Match(proven, tuple(tips))


def _prove(at: int, proven: int, probe: Callable[[int], tuple[int, int] | None]) -> tuple[list[int], bool] | int:
    """Tips that together hold [proven, at], and whether the older tips are still needed; or the first hole seen."""
    tips: list[int] = []
    while at >= proven:
        found = probe(at)
        if found is None:
            return at
        place, depth = found
        tips.append(place)
        at -= depth + 1
    return tips, at >= 0


class IndexWriter:
    """Write side, the daemon's alone. `publish` returns False when the table is too full to take more."""

    def __init__(self, memory: memoryview, entries: int, epoch: int) -> None:
        assert entries & (entries - 1) == 0, "a power of two"
        assert index_bytes(entries) <= len(memory), "index size"
        self._words = memory.cast("Q")
        self._mask = entries - 1
        self._limit = entries * 5 // 8  # fuller, runs of used entries grow beyond what a reader probes
        self._entries = 0
        self._hand = 0
        self.lower = 0  # how many of them are not in RAM
        for word, value in enumerate((MAGIC, VERSION, epoch, entries)):
            self._words[word] = value

    def __len__(self) -> int:
        return self._entries

    def publish(self, namespace: bytes, key: bytes, place: int, depth: int) -> bool:
        """Make a page visible, or show where it is now. Not known to readers before this returns, known after."""
        hi, lo = _mixed(namespace, key)
        at, free = self._find(hi, lo)
        if at is None:
            if free is None or self._entries >= self._limit:
                return False
            at = free
            self._entries += 1
        else:
            self.lower -= self._words[at + 2] >= LOWER
            self._words[at] = WITHDRAWN  # nobody may see the old place with the new depth
        words = self._words
        words[at + 1] = lo
        words[at + 2] = place
        words[at + 3] = depth
        words[at] = hi if hi > WITHDRAWN else hi + 2
        self.lower += place >= LOWER
        return True

    def place(self, namespace: bytes, key: bytes) -> int | None:
        """Where the page is, or None."""
        at, _ = self._find(*_mixed(namespace, key))
        return None if at is None else self._words[at + 2]

    def withdraw(self, namespace: bytes, key: bytes) -> None:
        """Take a page out of sight; a no-op when it is not there."""
        at, _ = self._find(*_mixed(namespace, key))
        if at is None:
            return
        self._entries -= 1
        self.lower -= self._words[at + 2] >= LOWER
        self._words[at] = WITHDRAWN
        self._clear_tail(at)

    def make_room(self, want: int) -> int:
        """Withdraw up to `want` pages that are not in RAM, whichever come next; how many went."""
        words, mask, gone = self._words, self._mask, 0
        for _ in range(mask + 1 if self.lower else 0):
            at = HEADER_WORDS + ENTRY_WORDS * self._hand
            self._hand = (self._hand + _STRIDE) & mask  # all over the table: it must stay evenly filled
            if words[at] > WITHDRAWN and words[at + 2] >= LOWER:
                self._entries -= 1
                self.lower -= 1
                words[at] = WITHDRAWN
                self._clear_tail(at)
                gone += 1
                if gone == want or not self.lower:
                    break
        return gone

    def publish_lower(self, names: Sequence[bytes], tier: int) -> int:
        """Show that a tier (its bit) holds pages (namespace + key) that are not in RAM. How many found no room."""
        left: Sequence[bytes] = names
        room, refused = self._limit - self._entries, 0
        if len(names) >= _MANY and (room >= len(names) or room <= 0):
            from kvd import indexmany  # numpy: only where there is a lower tier

            entered = indexmany.enter(self._words, names, tier, full=room <= 0)
            self._entries += entered.new
            self.lower += entered.new
            left, refused = [names[at] for at in entered.left], entered.refused
        for name in left:
            refused += not self._publish_lower(name[:NAMESPACE_BYTES], name[NAMESPACE_BYTES:], tier)
        return refused

    def _publish_lower(self, namespace: bytes, key: bytes, tier: int) -> bool:
        place = self.place(namespace, key)
        tiers = place if place is not None and place >= LOWER else LOWER
        return self.publish(namespace, key, tiers | tier, 0)

    def withdraw_lower(self, tier: int) -> None:
        """A tier (its bit) holds nothing any more, as far as is known."""
        from kvd import indexmany

        gone = indexmany.withdraw(self._words, tier)
        self._entries -= gone
        self.lower -= gone

    def _find(self, hi: int, lo: int) -> tuple[int | None, int | None]:
        """The entry of a name, or None, and the first entry that could take it."""
        words, mask = self._words, self._mask
        slot, free = hi & mask, None
        if hi <= WITHDRAWN:
            hi += 2
        for _ in range(MAX_PROBES):
            at = HEADER_WORDS + ENTRY_WORDS * slot
            seen = words[at]
            if seen == hi and words[at + 1] == lo:
                return at, free
            if seen <= WITHDRAWN:
                free = at if free is None else free
                if seen == 0:
                    break
            slot = (slot + 1) & mask
        return None, free

    def _clear_tail(self, at: int) -> None:
        # A withdrawn entry right before a never-used one ends no probe chain: it can be never-used again.
        words, mask = self._words, self._mask
        slot = (at - HEADER_WORDS) // ENTRY_WORDS
        if words[HEADER_WORDS + ENTRY_WORDS * ((slot + 1) & mask)] != 0:
            return
        while words[HEADER_WORDS + ENTRY_WORDS * slot] == WITHDRAWN:
            words[HEADER_WORDS + ENTRY_WORDS * slot] = 0
            slot = (slot - 1) & mask


def _mixed(namespace: bytes, key: bytes) -> tuple[int, int]:
    return (
        int.from_bytes(key[:8], "big") ^ int.from_bytes(namespace[:8], "big"),
        int.from_bytes(key[8:16], "big") ^ int.from_bytes(namespace[8:16], "big"),
    )
