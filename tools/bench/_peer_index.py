"""One index of blocks in a process of its own, driven by lines of JSON: kvd's, or Dynamo's in `.venvs/dynamo`.

    python _peer_index.py kvd|dynamo WORKERS BLOCKS

Both are filled with the same blocks in the same order and asked the same chains; lookups are timed here, one by one.
Fillers are chains of 512 blocks in events of 32, each chain at one worker. Hashes are below 2^63 and serve Dynamo as
hashes of the block's tokens too: unchained ones would only make its children's maps smaller.
"""

import ctypes
import gc
import json
import random
import sys
import time
import zlib
from pathlib import Path

EVENT, FILLER = 32, 512
ROOT = Path(__file__).resolve().parents[2]


class Kvd:
    def __init__(self, blocks):
        from kvd.router.index import Index

        self.index = Index(2 * blocks)
        self.find = self.index.match

    def store(self, worker, parent, hashes):
        assert self.index.store(worker, parent, hashes)

    def scores(self, found):
        return found


class Dynamo:
    def __init__(self, blocks):
        from dynamo._core import RadixTree

        self.tree = RadixTree()
        self.events = 0

    def store(self, worker, parent, hashes):
        blocks = [{"block_hash": block, "tokens_hash": block} for block in hashes]
        event = {"event_id": self.events, "dp_rank": 0, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}}
        self.tree.apply_event(worker, json.dumps(event).encode())
        self.events += 1

    def find(self, chain):
        return self.tree.find_matches(chain).scores

    def scores(self, found):
        return {worker: depth for (worker, _), depth in found.items()}


def cases(workers, draw):
    """Name -> chains to ask for, and what of each is stored where: [(worker, blocks)]."""

    def hashes(count):
        return [draw.getrandbits(63) for _ in range(count)]

    def case(copies, length, known, holders):
        """`holders` workers have the chain, each another part of the `known` first blocks."""
        made = []
        for _ in range(copies):
            chosen = draw.sample(range(workers), min(holders, workers))
            step = known // len(chosen) if chosen else 0
            made.append((hashes(length), [(worker, step * (n + 1)) for n, worker in enumerate(chosen)]))
        return made

    found = {
        "64 known to one": case(16, 64, 64, 1),
        "512 known to one": case(16, 512, 512, 1),
        "2048 to 8 depths": case(4, 2048, 2048, 8),
        "8192 known to one": case(2, 8192, 8192, 1),
        "8192, a quarter known": case(2, 8192, 2048, 2),
        f"8192 to {min(64, workers)} depths": case(2, 8192, 8192, 64),
        "2048 unknown": case(4, 2048, 0, 0),
    }
    everyone = hashes(64)
    known = [(worker, 64) for worker in range(workers)]
    found["512, everyone has 64"] = [
        (everyone + hashes(448), [*known, (draw.randrange(workers), 256)]) for _ in range(4)
    ]
    return found


def fill(index, chains, workers, blocks, draw):
    """Until there are so many distinct blocks. Returns how many there are."""
    distinct = set()
    for chain, places in chains:
        for worker, count in places:
            for at in range(0, count, EVENT):
                index.store(worker, chain[at - 1] if at else None, chain[at : min(at + EVENT, count)])
            distinct.update(chain[:count])
    total = len(distinct)
    del distinct
    while total < blocks:
        worker, parent = draw.randrange(workers), None
        for _ in range(FILLER // EVENT):
            hashes = [draw.getrandbits(63) for _ in range(EVENT)]
            index.store(worker, parent, hashes)
            parent = hashes[-1]
            total += EVENT
    return total


def resident_bytes():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def lookups(index, asked, count):
    """Median microseconds of one lookup, and a checksum over all answers."""
    times, answers = [], []
    find = index.find
    for number in range(count):
        chain = asked[number % len(asked)][0]
        started = time.perf_counter()
        found = find(chain)
        times.append(time.perf_counter() - started)
        answers.append(sorted(index.scores(found).items()))
    times.sort()
    return {"us": 1e6 * times[len(times) // 2], "answers": zlib.crc32(json.dumps(answers).encode())}


def main():
    kind, workers, blocks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(workers * 31 + blocks)
    every = cases(workers, draw)
    if kind == "kvd":
        sys.path.insert(0, str(ROOT))
    index = Kvd(blocks) if kind == "kvd" else Dynamo(blocks)
    before = resident_bytes()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "fill":
            total = fill(index, [one for made in every.values() for one in made], workers, blocks, draw)
            answer = {"blocks": total, "bytes_per_block": (resident_bytes() - before) / total}
        elif request["do"] == "cases":
            answer = {"names": list(every)}
        else:
            answer = lookups(index, every[request["case"]], request["count"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
