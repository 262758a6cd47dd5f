"""The sockets through which a router follows a node: where there are none, and where what comes is no message."""

import asyncio
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from kvd import wire
from kvd.router.follow import Follow
from kvd.router.numbering import Numbering
from kvd.router.view import ASK_AGAIN_S, View
from kvd.sglang_events import GPU
from tests.index_model import SetIndex


@contextmanager
def following(folder: Path) -> Iterator[tuple[Follow, View, "zmq.Socket[bytes]"]]:
    """A router's sockets, what they tell it, and the socket at which a node would answer them."""
    endpoint = f"ipc://{folder}/events"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as node:
        node.bind(f"{endpoint}.replay")
        view = View(SetIndex(), Numbering())
        follow = Follow(context, endpoint, f"{endpoint}.replay", view)
        try:
            yield follow, view, node
        finally:
            follow.close()


def test_without_descriptors_a_node_is_asked_later_and_nothing_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        with following(tmp_path) as (follow, view, node):
            follow.tick(1.0)
            had = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, had[1]))
            try:
                follow.tick(1.5)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, had)
            assert view.snapshots == 1
            assert not node.poll(0), "nobody could be asked"
            for tenth in range(int(10 * ASK_AGAIN_S) + 1):
                follow.tick(1.5 + tenth / 10)
            assert node.poll(5000)
            assert node.recv_multipart()[-1] == wire.encode(wire.GetSnapshot(2))

    asyncio.run(scenario())


def part_of(wanted: int, block: int) -> bytes:
    runs = [(None, wire.pack_hashes([block]))]
    return wire.encode(wire.SnapshotPart(wanted, "n", 1, 0, wire.Source("http://a", block_tokens=4), "", GPU, runs))


@pytest.mark.parametrize(
    "broken", [b"\xc1", wire.encode(wire.GetSnapshot(1)), None], ids=["bytes", "another", "hashes"]
)
def test_a_snapshot_of_which_a_part_cannot_be_read_is_asked_for_anew(tmp_path: Path, broken: bytes | None) -> None:
    """Without that part the view would say that it is exact, and lack blocks; a node that always errs is not asked
    all the time."""

    async def scenario() -> None:
        with following(tmp_path) as (follow, view, node):
            now = 1.0

            async def answer(number: int, bad: bool) -> None:
                """One snapshot of two blocks, once it is asked for."""
                assert await asyncio.to_thread(node.poll, 5000)
                asker, *_, request = node.recv_multipart()
                assert request == wire.encode(wire.GetSnapshot(number))
                torn = wire.encode(
                    wire.SnapshotPart(number, "n", 1, 0, wire.Source("http://a"), "", GPU, [(None, b"x")])
                )
                second = part_of(number, 2) if not bad else torn if broken is None else broken
                last = wire.encode(wire.SnapshotPart(number, "n", 1, 0, None))
                for raw in (part_of(number, 1), second, last):
                    node.send_multipart([asker, b"", raw])

            async def until(predicate: Callable[[], object]) -> None:
                for _ in range(500):
                    if predicate():
                        return
                    await asyncio.sleep(0.01)
                raise AssertionError(f"not in time: {view.why(now)}")

            def tick(later_s: float) -> None:
                nonlocal now
                follow.tick(now + later_s - 0.5)
                now += later_s
                follow.tick(now)

            follow.tick(now)
            tick(0.5)
            pause_s = ASK_AGAIN_S
            for number in (1, 2, 3):
                assert view.snapshots == number
                await answer(number, bad=True)
                await until(lambda number=number: follow.unreadable == number)
                assert "could not be read" in view.why(now)
                tick(pause_s)
                assert view.snapshots == number, "not as soon as the last time"
                pause_s *= 2
                tick(pause_s / 2)
            await answer(4, bad=False)
            await until(lambda: not view.why(now))
            assert [sorted(held) for held in view._index.held.values()] == [[1, 2]]  # type: ignore[attr-defined]

    asyncio.run(scenario())
