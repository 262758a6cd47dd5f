"""A router's view of a node: exact means true, for any fate of messages."""

import os
from array import array
from collections.abc import Iterator, Sequence
from random import Random

from kvd import wire
from kvd.brief import Brief
from kvd.router.index import Index
from kvd.sglang_events import CPU_PINNED, GPU, AnyEvent, Cleared
from tests.index_model import SetIndex, leading
from tests.node_model import ModelNode, ModelWorker, Seen
from tests.publisher_model import removed, stored

SEQUENCES = int(os.environ.get("KVD_EVENT_SEQUENCES", "300"))  # of the long test; each has a number
FIRST = int(os.environ.get("KVD_FIRST_SEQUENCE", "0"))


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
        self._truths[self._node.stream.seq] = self._node.truth


def test_exact_means_true_for_any_fate_of_messages() -> None:
    for seed in range(FIRST, FIRST + SEQUENCES):
        try:
            Fate(Random(seed)).play()
        except Exception as error:
            error.add_note(f"KVD_FIRST_SEQUENCE={seed} KVD_EVENT_SEQUENCES=1 plays it again")
            raise
