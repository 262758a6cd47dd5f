"""A node's stream from its sockets into an index, by the router's own parts, in a process of its own.

    python _ingest.py ENDPOINT REPLAY_ENDPOINT CHAIN

CHAIN is a list in JSON. Once the view is exact and a lookup says that somebody has the whole chain, a line on standard
input is answered with how many blocks the index has, and when (of the clock that all processes share) that was so.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Sequence

import uvloop
import zmq

from kvd.router.follow import Follow
from kvd.router.index import Index
from kvd.router.main import COLLECT_AFTER
from kvd.router.numbering import Numbering
from kvd.router.view import View

LOOK_EVERY_S = 0.002


async def take(endpoint: str, replay_endpoint: str, chain: Sequence[int]) -> dict[str, float]:
    index = Index(1 << 22)
    view = View(index, Numbering())
    with zmq.Context() as context:
        follow = Follow(context, endpoint, replay_endpoint, view)
        while view.why(time.monotonic()) or len(chain) not in index.match(chain).values():
            follow.tick(time.monotonic())
            await asyncio.sleep(LOOK_EVERY_S)
        at = time.monotonic()
        follow.close()
    return {"blocks": index.stats().blocks, "at": at}


def main() -> None:
    endpoint, replay_endpoint, chain = sys.argv[1:]
    gc.set_threshold(*COLLECT_AFTER)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        done = runner.run(take(endpoint, replay_endpoint, json.loads(chain)))
    sys.stdin.readline()
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
