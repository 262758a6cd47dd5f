"""A node of a shared tier in a process of its own, for tests that kill it: puts, reads, keeps house for ever.

    python -m tests.shared_process FOLDER NODE SEED [TURNS]

Prints a line for what it did: "put 3 17" once those pages are acknowledged, "wrong 5" for bytes that differ.
"""

import random
import sys
from contextlib import suppress

from kvd.storage.shared import SharedTier
from kvd.storage.tier import TierError
from tests.tier_samples import Sample, get, put, sample

PAGES = 300


def page(number: int) -> Sample:
    return sample(number, 4096 * (1 + number % 5) + number % 2, 1 + number % 2)


def open_node(folder: str, node: str) -> SharedTier:
    """Merges often, waits hardly at all."""
    return SharedTier(folder, node, 1 << 30, file_bytes=300_000, poll_s=0.0, grace_s=0.05, leftover_s=30.0)


def main(folder: str, node: str, seed: str, turns: str = "1000000") -> None:
    rng = random.Random(seed)
    tier = open_node(folder, node)
    print("ready", flush=True)
    for _ in range(int(turns)):
        numbers = rng.sample(range(PAGES), 3)
        with suppress(TierError):
            stored = put(tier, *map(page, numbers))
            print("put", *(n for n, ok in zip(numbers, stored, strict=True) if ok), flush=True)
            tier.news()
        numbers = rng.sample(range(PAGES), 8)
        for number, got in zip(numbers, get(tier, *map(page, numbers)), strict=True):
            if got not in (None, page(number)):
                print("wrong", number, flush=True)
    tier.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
