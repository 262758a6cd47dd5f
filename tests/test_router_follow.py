"""The sockets through which a router follows a node: what it does where the machine gives none."""

import asyncio
import resource
from pathlib import Path

import zmq

from kvd import wire
from kvd.router.follow import Follow
from kvd.router.numbering import Numbering
from kvd.router.view import ASK_AGAIN_S, View
from tests.index_model import SetIndex


def test_without_descriptors_a_node_is_asked_later_and_nothing_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        endpoint = f"ipc://{tmp_path}/events"
        with zmq.Context() as context, context.socket(zmq.ROUTER) as node:
            node.bind(f"{endpoint}.replay")
            view = View(SetIndex(), Numbering())
            follow = Follow(context, endpoint, f"{endpoint}.replay", view)
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
            follow.close()

    asyncio.run(scenario())
