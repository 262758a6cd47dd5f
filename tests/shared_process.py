"""A node of a shared tier in a process of its own, for tests that kill it: puts, reads, keeps house for ever.

    python -m tests.shared_process URI NODE SEED TURNS GRACE_S POLL_S

Prints a line for what it did: "put 3 17" once those pages are acknowledged, "wrong 5" for bytes that differ, "lost 5"
for a page that it held, whose file was deleted under it.
"""

import random
import sys
from contextlib import suppress

from kvd.storage.shared import SharedTier
from kvd.storage.tier import TierError
from tests.shared_folder import PollingTier
from tests.tier_samples import Sample, get, put, sample

PAGES = 300


def page(number: int) -> Sample:
    return sample(number, 4096 * (1 + number % 5) + number % 2, 1 + number % 2)


def open_node(uri: str, node: str, grace_s: float = 0.05, poll_s: float = 0.0) -> SharedTier:
    """Merges often, waits hardly at all."""
    return PollingTier(uri, node, 1 << 30, file_bytes=300_000, poll_s=poll_s, grace_s=grace_s, leftover_s=30.0)


def main(uri: str, node: str, seed: str, turns: str, grace_s: str, poll_s: str) -> None:
    rng = random.Random(seed)
    tier = open_node(uri, node, float(grace_s), float(poll_s))
    print("ready", flush=True)
    for _ in range(int(turns)):
        numbers = rng.sample(range(PAGES), 3)
        with suppress(TierError):
            stored = put(tier, *map(page, numbers))
            print("put", *(n for n, ok in zip(numbers, stored, strict=True) if ok), flush=True)
            tier.news()
        numbers = rng.sample(range(PAGES), 8)
        held = tier.find([page(number).page.name for number in numbers])
        for number, known, got in zip(numbers, held, get(tier, *map(page, numbers)), strict=True):
            if got not in (None, page(number)):
                print("wrong", number, flush=True)
            if known and got is None:
                print("lost", number, flush=True)
    tier.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
