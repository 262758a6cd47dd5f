"""What workers have of a prompt: a node's stream into a view, the index behind it, and what is credited for it."""

from collections.abc import Mapping

from kvd import wire
from kvd.brief import Briefs
from kvd.daemon.stream import Stream
from kvd.router.index import Index
from kvd.router.matching import Member, Members, matched
from kvd.router.numbering import Numbering, Place
from kvd.router.policies.choice import Matched
from kvd.router.view import View
from kvd.sglang_events import GPU, AnyEvent, Cleared, Removed, Stored
from tests.publisher_model import stored

A, B, OTHER = "http://a:1", "http://b:1", "ff" * 16
MINE, SIDE = "01" * 16, "02" * 16
CHAIN = list(range(100, 110))
MEMBERS = Members({
    A: Member("n", A, 16, frozenset({MINE})),
    B: Member("n", B, 16, frozenset({MINE})),
    "http://far:1": Member("m", "http://far:1", 16, frozenset({MINE})),
})  # fmt: skip


class World:
    """One node's stream and a router that hears all of it."""

    def __init__(self, max_blocks: int = 1000) -> None:
        self.index, self.numbers = Index(max_blocks), Numbering()
        self.view = View(self.index, self.numbers)
        self._stream, self._briefs = Stream("n", 7, 100), Briefs()
        ask = self.view.ask(0.0)
        assert ask is not None
        assert ask.start is None
        self.view.part(wire.SnapshotPart(ask.request, "n", 7, -1, None), 0.0)

    def say(self, source: wire.Source, *events: AnyEvent, why: str = "") -> None:
        self._stream.say(source, events, why)
        for frames in self._stream.flush(1.0):
            message = self._briefs.read(frames)
            assert message is not None
            self.view.batch(*message, 1.0)

    def matched(self, tokens: int = 165) -> Mapping[str, Matched]:
        assert self.view.why(1.0) == ""
        return matched(self.index.match(CHAIN), self.sure, MEMBERS, tokens)

    def sure(self, number: int) -> Place | None:
        return self.numbers.place(number) if self.index.exact(number) else None


def has(medium: str, blocks: int, first: int = 0) -> Stored:
    event = stored(CHAIN[first : first + blocks], CHAIN[first - 1] if first else None)
    event.medium = medium
    return event


def kvd(namespace: str) -> wire.Source:
    return wire.Source(namespace=namespace, pool="kv", block_tokens=16)


def test_a_worker_has_its_own_and_what_its_nodes_kvd_keeps() -> None:
    world = World()
    world.say(wire.Source(A), has(GPU, 3))
    world.say(wire.Source(A), has("CPU_PINNED", 4))
    world.say(kvd(MINE), has(wire.RAM, 6))
    world.say(kvd(MINE), has(wire.NVME, 8))
    world.say(kvd(MINE), has(wire.SHARED, 10))
    of_kvd = Matched(0, 96, 128, 160)
    assert world.matched() == {A: of_kvd._replace(gpu=48), B: of_kvd}


def test_other_models_pages_are_not_credited() -> None:
    world = World()
    world.say(kvd(OTHER), has(wire.RAM, 6))
    world.say(kvd(SIDE), has(wire.NVME, 6))
    assert world.matched() == {}


def test_the_rank_that_has_most_counts_and_no_more_than_the_prompt() -> None:
    world = World()
    world.say(wire.Source(A, 0), has(GPU, 3))
    world.say(wire.Source(A, 1), has(GPU, 10))
    assert world.matched(70) == {A: Matched(gpu=70)}


def test_a_hole_ends_what_is_held_and_a_clear_takes_all() -> None:
    world = World()
    world.say(wire.Source(A), has(GPU, 10))
    world.say(wire.Source(A), Removed(block_hashes=[CHAIN[4]], medium=GPU))
    assert world.matched() == {A: Matched(gpu=64)}
    world.say(wire.Source(A), has(GPU, 1, 4))
    assert world.matched() == {A: Matched(gpu=160)}
    world.say(wire.Source(A), Cleared())
    assert world.matched() == {}


def test_a_holder_that_said_more_than_the_index_takes_is_not_credited() -> None:
    world = World(max_blocks=6)
    world.say(wire.Source(B), has(GPU, 2))
    world.say(wire.Source(A), has(GPU, 10))
    assert world.matched() == {B: Matched(gpu=32)}
    world.say(wire.Source(A), Cleared())
    world.say(wire.Source(A), has(GPU, 4))
    assert world.matched() == {A: Matched(gpu=64), B: Matched(gpu=32)}
