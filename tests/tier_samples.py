"""Pages for tests of tiers: the same bytes for the same number, put into buffers and read out of them."""

import mmap
import random
from typing import NamedTuple

import xxhash

from kvd.storage.tier import Name, Page, Tier

ALIGN = 4096
NAMESPACE = bytes(range(16))


class Sample(NamedTuple):
    """A page and its bytes, one string per shard."""

    page: Page
    data: tuple[bytes, ...]


def sample(number: int, length: int = 5000, shards: int = 1, version: int = 0) -> Sample:
    """The same for the same arguments. `version`: other bytes under the same name."""
    rng = random.Random(f"{number} {length} {shards} {version}")
    data = tuple(rng.randbytes(length) for _ in range(shards))
    sums = tuple(xxhash.xxh3_128_digest(shard) for shard in data)
    key, parent = (random.Random(n).randbytes(32) if n >= 0 else bytes(32) for n in (number, number - 1))
    return Sample(Page(NAMESPACE, key, parent, length, sums, tokens=16), data)


def room(length: int, shards: int = 1, aligned: bool = True) -> list[memoryview]:
    """Buffers for a page, full of what is not the page."""
    size = -(-length // ALIGN) * ALIGN
    found = []
    for _ in range(shards):
        memory = memoryview(mmap.mmap(-1, size + ALIGN))
        memory[:] = b"\xa5" * len(memory)
        found.append(memory[:size] if aligned else memory[8 : 8 + size])
    return found


def filled(what: Sample, aligned: bool = True) -> tuple[Page, list[memoryview]]:
    """As `put` takes it; what lies beyond the length is rubbish."""
    buffers = room(what.page.length, what.page.shards, aligned)
    for buffer, shard in zip(buffers, what.data, strict=True):
        buffer[: len(shard)] = shard
    return what.page, buffers


def put(tier: Tier, *samples: Sample, aligned: bool = True) -> list[bool]:
    return tier.put([filled(what, aligned) for what in samples])


def get(tier: Tier, *samples: Sample, aligned: bool = True) -> list[Sample | None]:
    """What is there under the samples' names, with buffers of the samples' sizes."""
    wanted = [(what.page.name, room(what.page.length, what.page.shards, aligned)) for what in samples]
    pages = tier.get(wanted)
    return [
        None if page is None else Sample(page, tuple(bytes(buffer[: page.length]) for buffer in buffers))
        for page, (_, buffers) in zip(pages, wanted, strict=True)
    ]


def held(tier: Tier) -> set[Name]:
    pieces = list(tier.names())
    flat = [name for piece in pieces for name in piece]
    assert len(flat) == len(set(flat)), "names come once"
    return set(flat)
