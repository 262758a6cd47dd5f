"""Folders of NVMe tiers for tests: opened with their invariants checked, filled, looked into from outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from kvd.storage.nvme import NvmeTier
from tests.tier_samples import Sample, get, held, put, sample

MIB = 1 << 20
SEGMENT = MIB
LENGTH = 60_000  # 16 pages of 61440 bytes fit a segment of 1 MiB beside its header


def opened(folder: Path, size_bytes: int = 8 * MIB) -> NvmeTier:
    return NvmeTier(folder, size_bytes, SEGMENT)


@contextmanager
def reopened(folder: Path, size_bytes: int = 8 * MIB) -> Iterator[NvmeTier]:
    """The tier, with its invariants checked at the end."""
    tier = opened(folder, size_bytes)
    try:
        yield tier
        assert not tier.faults()
    finally:
        tier.close()


def fill(folder: Path, count: int = 60) -> list[Sample]:
    """Pages over four segments."""
    samples = [sample(n, LENGTH) for n in range(count)]
    with reopened(folder) as tier:
        assert all(put(tier, *samples))
    return samples


def segment(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:05d}.kvd"


def absent_or_right(tier: NvmeTier, samples: list[Sample]) -> list[bool]:
    """Which pages are there. What find says is what get brings, and names and usage agree."""
    got = get(tier, *samples)
    assert all(found in (None, want) for found, want in zip(got, samples, strict=True))
    there = [found is not None for found in got]
    names = [want.page.name for want in samples]
    assert [page is not None for page in tier.find(names)] == there
    assert held(tier) == {name for name, is_there in zip(names, there, strict=True) if is_there}
    assert tier.usage().pages == sum(there)
    return there


@contextmanager
def catalog(folder: Path, write: bool = False) -> Iterator[tuple[lmdb.Transaction, object, object]]:
    env = lmdb.open(str(folder / "catalog"), map_size=1 << 30, max_dbs=2)
    try:
        pages, meta = env.open_db(b"pages"), env.open_db(b"meta")
        with env.begin(write=write) as transaction:
            yield transaction, pages, meta
    finally:
        env.close()
