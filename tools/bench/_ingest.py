"""Events of one worker from a socket into the index, in a process of its own, driven by lines of JSON.

    python _ingest.py ENDPOINT

What it decodes with stands in for the router's view of a worker: the same library, as little as an index needs.
{"chain": [...]} takes events until a lookup says that the worker has the whole chain, and answers how many came.
"""

import json
import sys

import msgspec
import zmq

from kvd.router.index import Index

WORKER = 1
EVENTS_PER_LOOK = 64


class Stored(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    block_hashes: list[int]
    parent_block_hash: int | None = None


class Removed(msgspec.Struct, tag_field="type", tag="BlockRemoved", gc=False):
    block_hashes: list[int]


class Cleared(msgspec.Struct, tag_field="type", tag="AllBlocksCleared", gc=False):
    pass


def main() -> None:
    decode = msgspec.msgpack.Decoder(tuple[float, list[Stored | Removed | Cleared], int | None]).decode
    index = Index(1 << 22)
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.subscribe("")
        socket.connect(sys.argv[1])
        for line in sys.stdin:
            chain = json.loads(line)["chain"]
            taken = 0
            while index.match(chain).get(WORKER) != len(chain):
                for _ in range(EVENTS_PER_LOOK):
                    _, events, _ = decode(socket.recv_multipart()[2])
                    taken += 1
                    for event in events:
                        _apply(index, event)
                    if not socket.get(zmq.EVENTS) & zmq.POLLIN:
                        break
            print(json.dumps({"events": taken}), flush=True)


def _apply(index: Index, event: Stored | Removed | Cleared) -> None:
    if isinstance(event, Stored):
        assert index.store(WORKER, event.parent_block_hash, event.block_hashes)
    elif isinstance(event, Removed):
        index.remove(WORKER, event.block_hashes)
    else:
        index.clear(WORKER)


if __name__ == "__main__":
    main()
