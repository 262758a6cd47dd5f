"""A node of models, its stream, and a view that hears it: without a network between."""

from collections.abc import Iterator

from kvd import wire
from kvd.brief import Brief, Briefs
from kvd.daemon.mirror import Mirror
from kvd.daemon.stream import Stream, snapshot
from kvd.router.numbering import Numbering, Place
from kvd.router.view import ASK_AGAIN_S, View
from tests.index_model import SetIndex
from tests.publisher_model import ModelPublisher

BRIEFS = Briefs()
Truth = dict[Place, dict[int, int | None]]
MANY = 1000


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
        """Ask and answer until nothing is missing, while the node says that it is there."""
        for _ in range(8):
            self.now += ASK_AGAIN_S
            node.stream.say(wire.Source())
            self.hear(node)
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
        raise AssertionError(f"still not exact: {self.why}")
