"""A node over plain memory with a tier below that answers when the test lets it."""

from collections.abc import Callable, Sequence

import xxhash

from kvd import wire
from kvd.daemon.sessions import Session
from kvd.storage.tier import Name, Page
from tests.node_world import World

BIT = 2


class DictTier:
    """What the process of a lower tier answers, whenever the test lets it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ready = True
        self.pages: dict[Name, tuple[Page, list[bytes]]] = {}
        self._owed: list[Callable[[], None]] = []
        self.floor = 0.0
        self.density: Sequence[float] = ()
        self.tenants: dict[bytes, str] = {}
        self.kinds: dict[Name, int] = {}

    def judge(self, density: Sequence[float]) -> None:
        self.density = density

    def used(self, pages: Sequence[tuple[Name, int]]) -> None:
        self.kinds.update(pages)

    def belongs(self, namespace: bytes, tenant: str) -> None:
        self.tenants[namespace] = tenant

    def wants(self, density: float, before: int) -> bool:
        return density >= self.floor

    def load(
        self, length: int, wanted: Sequence[tuple[Name, list[int]]], done: Callable[[list[Page | None]], None]
    ) -> None:
        def answer() -> None:
            found: list[Page | None] = []
            for name, offsets in wanted:
                page, payloads = self.pages.get(name, (None, []))
                fits = page is not None and (page.length, page.shards) == (length, len(offsets))
                for offset, payload in zip(offsets, payloads if fits else [], strict=False):
                    self.world.memory[offset : offset + length] = payload
                found.append(page if fits else None)
            done(found)

        self._owed.append(answer)

    def store(self, pages: Sequence[tuple[Page, list[int]]], done: Callable[[list[bool]], None]) -> None:
        def answer() -> None:
            for page, offsets in pages:
                payloads = [bytes(self.world.memory[o : o + page.length]) for o in offsets]
                assert [xxhash.xxh3_128_digest(p) for p in payloads] == list(page.checksums), "not what was committed"
                self.pages[page.name] = (page, payloads)
            done([True] * len(pages))

        self._owed.append(answer)

    def answer(self, count: int = 1_000_000) -> None:
        """Answer what was asked so far, in order."""
        owed, self._owed = self._owed[:count], self._owed[count:]
        for answer in owed:
            answer()


class TwoTiers(World):
    """A node with a tier below."""

    def start(self) -> None:
        super().start()
        self.tier = DictTier(self)
        self.writeback = self.node.add_tier(BIT, self.tier, 1.0)
        self.node.promotion.clock = lambda: self.now

    def settle(self) -> None:
        """Time passes until everything is written back."""
        for _ in range(50):
            self.now += 1.0
            self.node.tick(self.now)
            self.tier.answer()
            if not len(self.writeback):
                return
        raise AssertionError("never idle")

    def lookup(self, session: Session, keys: list[bytes], ns: int = 0) -> int:
        request = wire.Lookup(1, ns, b"".join(keys), 10.0)
        return self.node.reading.lookup(session, request, self.now).pages

    def evict_all(self) -> None:
        """Everything leaves RAM that nobody holds."""
        for line in self.node.stock.departures.offers():
            while self.node.space.evict(line, 100, self.now):
                pass
