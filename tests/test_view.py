"""A router's view of a node: exact when it says so, whatever is lost, doubled, late, or killed in between."""

import os
from array import array
from collections.abc import Container, Iterator, Sequence
from random import Random

import pytest

from kvd import wire
from kvd.brief import Brief, Briefs
from kvd.daemon.mirror import Mirror
from kvd.daemon.stream import Stream, snapshot
from kvd.errors import PeerError
from kvd.router.index import Index
from kvd.router.numbering import Numbering, Place
from kvd.router.view import ASK_AGAIN_S, MOST_SOURCES, SILENT_S, View
from kvd.sglang_events import CPU_PINNED, GPU, AnyEvent, Cleared
from tests.index_model import SetIndex
from tests.publisher_model import ModelPublisher, removed, stored

SEQUENCES = int(os.environ.get("KVD_EVENT_SEQUENCES", "300"))  # of the long test; each has a number
FIRST = int(os.environ.get("KVD_FIRST_SEQUENCE", "0"))
MANY = 1000
BRIEFS = Briefs()
Truth = dict[Place, dict[int, int | None]]


class ModelWorker:
    """A rank of a worker and the node's mirror of it, without a network between."""

    def __init__(self, url: str) -> None:
        self.source = wire.Source(url, 0, block_tokens=4)
        self.publisher = ModelPublisher(100)
        self.mirror = Mirror(MANY)
        self.mirror.replay_ended()

    held = property(lambda self: self.mirror.held)
    why = property(lambda self: self.mirror.why)


class ModelNode:
    """A node's kvd: workers, the stream, and what it has sent."""

    def __init__(self, epoch: int, depth: int, workers: list[ModelWorker]) -> None:
        self.stream = Stream("n", epoch, depth)
        self.workers = workers
        self.sent: list[tuple[int, Brief]] = []

    def say(self, worker: ModelWorker, *events: object) -> None:
        changed = worker.mirror.live(*worker.publisher.publish(*events))  # type: ignore[arg-type]
        self.stream.say(worker.source, changed, worker.why)

    def flush(self) -> None:
        self.sent += (read(message) for message in self.stream.flush(1.0))

    def replay(self, start: int) -> list[tuple[int, Brief]]:
        return [read(message) for message in self.stream.replay(start)]

    def snapshot(self, request: int) -> Iterator[wire.SnapshotPart]:
        for part in snapshot(request, self.stream, lambda: self.workers, self.flush):
            yield wire.decode_from_stream(wire.encode(part))

    @property
    def truth(self) -> Truth:
        """What it holds; call it when all is flushed."""
        return {
            Place("n", worker.source.worker, 0, "", medium): dict(blocks)
            for worker in self.workers
            for medium, blocks in worker.held.items()
            if blocks
        }


def read(message: tuple[bytes, bytes, bytes]) -> tuple[int, Brief]:
    found = BRIEFS.read(message)
    assert found is not None
    return found


class Seen:
    """A view and what it filled."""

    def __init__(self, index: SetIndex | None = None) -> None:
        self.index, self.holders, self.now = index or SetIndex(), Numbering(), 100.0
        self.view = View(self.index, self.holders)

    @property
    def held(self) -> Truth:
        found = {self.holders.place(number): blocks for number, blocks in self.index.held.items() if blocks}
        assert None not in found, "all that is held is held by somebody"
        return {place: blocks for place, blocks in found.items() if place is not None}

    @property
    def why(self) -> str:
        return self.view.why(self.now)

    def hear(self, node: ModelNode) -> None:
        """All that the node has sent and is not heard yet."""
        node.flush()
        for seq, batch in node.sent:
            self.view.batch(seq, batch, self.now)
        node.sent.clear()

    def heal(self, node: ModelNode) -> None:
        """Ask and answer until nothing is missing."""
        for _ in range(8):
            self.now += ASK_AGAIN_S
            wanted = self.view.ask(self.now)
            if wanted is None:
                return
            if wanted.start is None:
                for part in node.snapshot(wanted.request):
                    self.view.part(part, self.now)
            else:
                for seq, batch in node.replay(wanted.start):
                    self.view.batch(seq, batch, self.now)
                self.view.replay_ended(self.now)
            self.hear(node)
        raise AssertionError(f"still not exact: {self.why}")


@pytest.fixture
def node() -> ModelNode:
    return ModelNode(1, 8, [ModelWorker("http://a"), ModelWorker("http://b")])


@pytest.fixture
def seen(node: ModelNode) -> Seen:
    """One that is exact already."""
    seen = Seen()
    assert seen.why == "no snapshot has come yet"
    seen.heal(node)
    assert seen.why == ""
    return seen


def test_blocks_are_seen_with_their_parents_by_worker_and_medium(node: ModelNode, seen: Seen) -> None:
    a, b = node.workers
    node.say(a, stored([1, 2, 3]), stored([1], None, "CPU_PINNED"))
    node.say(b, stored([1, 2]), removed([2]))
    seen.hear(node)
    assert seen.held == node.truth
    assert seen.held[Place("n", "http://a", 0, "", GPU)] == {1: None, 2: 1, 3: 2}
    assert seen.why == ""
    assert seen.view.sources["http://a", 0, ""].source.block_tokens == 4


def test_a_late_router_gets_all_with_one_snapshot(node: ModelNode) -> None:
    for n in range(50):
        node.say(node.workers[n % 2], stored([3 * n, 3 * n + 1, 3 * n + 2]), removed([3 * n + 1]))
        node.flush()
    seen = Seen()
    seen.heal(node)
    assert seen.why == ""
    assert seen.held == node.truth
    assert (seen.view.snapshots, seen.view.replays) == (1, 0)


def test_what_happens_while_a_snapshot_is_made_is_in_it_or_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_BLOCKS", 2)
    node = ModelNode(1, 100, [ModelWorker("http://a")])
    (a,) = node.workers
    node.say(a, stored(list(range(10))))
    seen = Seen()
    wanted = seen.view.ask(seen.now)
    assert wanted is not None
    for step, part in enumerate(node.snapshot(wanted.request)):
        node.say(a, removed([9 - step, step]), stored([100 + step], 5))
        seen.hear(node)
        seen.view.part(part, seen.now)
    seen.hear(node)
    assert seen.why == ""
    assert seen.held == node.truth


def test_a_lost_batch_is_repeated(node: ModelNode, seen: Seen) -> None:
    node.say(node.workers[0], stored([1]))
    node.flush()
    node.sent.clear()
    node.say(node.workers[0], stored([2], 1))
    seen.hear(node)
    assert seen.why == "batches from 0 on are missing"
    seen.heal(node)
    assert seen.why == ""
    assert seen.held == node.truth
    assert (seen.view.snapshots, seen.view.replays) == (1, 1)


def test_what_cannot_be_repeated_any_more_comes_as_a_snapshot(node: ModelNode, seen: Seen) -> None:
    for n in range(20):
        node.say(node.workers[0], stored([n]))
        node.flush()
    node.sent.clear()
    node.say(node.workers[0], removed([0]))
    seen.hear(node)
    seen.heal(node)
    assert seen.why == ""
    assert seen.held == node.truth
    assert seen.view.snapshots == 2


def test_another_life_of_the_node_begins_with_a_snapshot(node: ModelNode, seen: Seen) -> None:
    node.say(node.workers[0], stored([1]))
    seen.hear(node)
    following = ModelNode(2, 8, node.workers[1:])
    following.say(following.workers[0], stored([7]))
    seen.hear(following)
    assert seen.why == "no snapshot has come yet"
    seen.heal(following)
    assert seen.why == ""
    assert seen.held == following.truth == {Place("n", "http://b", 0, "", GPU): {7: None}}


def test_silence_and_a_broken_connection_are_not_exact(node: ModelNode, seen: Seen) -> None:
    seen.now += SILENT_S + 1
    assert "said nothing" in seen.why
    seen.heal(node)
    assert seen.why == ""
    seen.view.doubt()
    assert "connection broke" in seen.why
    seen.heal(node)
    assert seen.why == ""


def test_what_the_node_does_not_know_exactly_is_passed_on(node: ModelNode, seen: Seen) -> None:
    a = node.workers[0]
    a.mirror.doubt()
    node.stream.say(a.source, [], a.why)
    seen.hear(node)
    assert seen.why == ""
    assert "connection" in seen.view.sources["http://a", 0, ""].why


def test_clearing_reaches_one_source_and_where_it_is_said_one_medium(node: ModelNode, seen: Seen) -> None:
    a, b = node.workers
    for worker in (a, b):
        node.say(worker, stored([1]), stored([1], None, "CPU_PINNED"))
    node.say(a, Cleared())
    seen.hear(node)
    assert {place.worker for place in seen.held} == {"http://b"}
    node.stream.say(b.source, [Cleared(medium=GPU)])
    seen.hear(node)
    assert {place.medium for place in seen.held} == {"CPU_PINNED"}


def test_a_node_that_is_left_leaves_nothing(node: ModelNode, seen: Seen) -> None:
    node.say(node.workers[0], stored([1]))
    seen.hear(node)
    seen.view.close()
    assert seen.index.held == {}
    assert len(seen.holders) == 0
    assert seen.why


@pytest.mark.parametrize("run", [(1 << 63, b"x" * 8), (None, b"x")])
def test_a_part_whose_hashes_are_none_is_refused_as_a_whole(node: ModelNode, run: tuple[int | None, bytes]) -> None:
    seen = Seen()
    wanted = seen.view.ask(seen.now)
    assert wanted is not None
    source = node.workers[0].source
    raw = wire.encode(wire.SnapshotPart(wanted.request, "n", 1, -1, source, "", GPU, [(None, b"y" * 8), run]))
    with pytest.raises(PeerError):
        seen.view.part(wire.decode_from_stream(raw), seen.now)
    assert seen.held == {}


def test_sources_without_end_are_bounded(seen: Seen) -> None:
    stream = Stream("n", 1, 8)
    for n in range(MOST_SOURCES + 10):
        stream.say(wire.Source(f"http://{n}"), [stored([n])])
        for message in stream.flush(1.0):
            seen.view.batch(*read(message), seen.now)
    assert len(seen.view.sources) == MOST_SOURCES
    assert len(seen.held) == MOST_SOURCES - 2, "two were there before, and hold nothing"


# What workers may hold in the long test: a tree of blocks, as the paths from its top to its leaves.
TRUNK = list(range(1, 9))
PATHS = [TRUNK, [*TRUNK[:3], 11, 12, 13], [*TRUNK[:5], 21, 22], [31, 32]]
BLOCKS = sorted({block for path in PATHS for block in path})


def chained_events(random: Random) -> Iterator[AnyEvent]:
    """What a worker might do next: among few blocks, so that the same ones come and go, with holes, late parents."""
    for _ in range(random.randint(1, 3)):
        medium = random.choice((GPU, CPU_PINNED, None))
        what = random.random()
        if what < 0.6:
            path = random.choice(PATHS)
            first = random.randrange(len(path)) if random.random() < 0.5 else 0
            yield stored(path[first : first + random.randint(1, 5)], path[first - 1] if first else None, medium)
        elif what < 0.8:
            path = random.choice(PATHS)
            first = random.randrange(len(path))
            yield removed(path[first : first + random.randint(1, 5)], medium)
        elif what < 0.95:
            yield removed(random.sample(BLOCKS, random.randint(1, 4)), medium)
        else:
            yield Cleared()


class Both(SetIndex):
    """Fills the router's own index too, and compares what that says with the sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(1000)

    def store(self, holder: int, parent: int | None, hashes: Sequence[int]) -> None:
        super().store(holder, parent, hashes)
        assert self.index.store(holder, parent, hashes), "nobody says anything wrong"

    def store_all(self, holder: int, stretches: Sequence[tuple[int | None, "array[int]"]]) -> None:
        for parent, hashes in stretches:
            SetIndex.store(self, holder, parent, hashes)
        assert self.index.store_all(holder, stretches), "nobody says anything wrong"

    def remove(self, holder: int, hashes: Sequence[int]) -> None:
        super().remove(holder, hashes)
        self.index.remove(holder, hashes)

    def clear(self, holder: int) -> None:
        super().clear(holder)
        self.index.clear(holder)

    def compare(self) -> None:
        for path in PATHS:
            truth = {holder: count for holder, held in self.held.items() if (count := leading(held, path))}
            assert self.index.match(path) == truth


def leading(held: Container[int], chain: Sequence[int]) -> int:
    return next((at for at, block in enumerate(chain) if block not in held), len(chain))


class Fate:
    """A node, a view of it, and what becomes of the messages between them: lost, late, twice, while it is killed
    and starts again. Whenever the view says it is exact, it holds what the node held after the same batch."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._workers = [ModelWorker("http://a"), ModelWorker("http://b")]
        self._epoch = 0
        self._both = Both()
        self._seen = Seen(self._both)
        self._coming: Iterator[wire.SnapshotPart] = iter(())
        self._live(random.choice((1, 4, 50)))

    def play(self) -> None:
        steps = (self._say, self._send, self._lose, self._delay, self._repeat, self._ask, self._part, self._kill,
                 self._heal)  # fmt: skip
        count = self._random.randint(1, 60)
        for step in self._random.choices(steps, (20, 12, 4, 4, 4, 6, 12, 1, 3), k=count):
            self._seen.now += 0.5
            step()
            self._verify()
        self._node.sent.clear()
        self._node.say(self._workers[0], stored([1]))
        self._flush()
        self._seen.hear(self._node)
        self._seen.heal(self._node)
        assert self._seen.why == ""
        assert self._seen.held == self._node.truth
        self._both.compare()

    def _live(self, depth: int) -> None:
        """Another life of the node's kvd, which knows the workers as they are."""
        self._epoch += 1
        self._node = ModelNode(self._epoch, depth, self._workers)
        self._coming = iter(())
        self._late: list[tuple[int, Brief]] = []
        self._truths = {-1: self._node.truth}
        self._verified = -2

    def _flush(self) -> None:
        self._node.flush()
        self._truths[self._node.stream.seq] = self._node.truth

    def _verify(self) -> None:
        view = self._seen.view
        if view.epoch == self._epoch and view.seq != self._verified and not self._seen.why:
            assert self._seen.held == self._truths[view.seq]
            self._both.compare()
            self._verified = view.seq

    def _say(self) -> None:
        self._node.say(self._random.choice(self._workers), *chained_events(self._random))
        self._flush()

    def _send(self) -> None:
        if self._node.sent:
            self._seen.view.batch(*self._node.sent.pop(0), self._seen.now)

    def _lose(self) -> None:
        if self._node.sent:
            self._node.sent.pop(self._random.randrange(len(self._node.sent)))

    def _delay(self) -> None:
        if self._node.sent:
            self._late.append(self._node.sent.pop(self._random.randrange(len(self._node.sent))))

    def _repeat(self) -> None:
        if self._late:
            self._seen.view.batch(*self._random.choice(self._late), self._seen.now)

    def _ask(self) -> None:
        wanted = self._seen.view.ask(self._seen.now)
        if wanted is None:
            return
        if wanted.start is None:
            self._coming = self._node.snapshot(wanted.request)
            return
        for seq, batch in self._node.replay(wanted.start):
            self._seen.view.batch(seq, batch, self._seen.now)
        self._seen.view.replay_ended(self._seen.now)

    def _part(self) -> None:
        if (part := next(self._coming, None)) is not None:
            self._seen.view.part(part, self._seen.now)

    def _kill(self) -> None:
        self._live(8)

    def _heal(self) -> None:
        self._coming = iter(())
        self._seen.heal(self._node)


def test_exact_means_true_for_any_fate_of_messages() -> None:
    for seed in range(FIRST, FIRST + SEQUENCES):
        try:
            Fate(Random(seed)).play()
        except Exception as error:
            error.add_note(f"KVD_FIRST_SEQUENCE={seed} KVD_EVENT_SEQUENCES=1 plays it again")
            raise
