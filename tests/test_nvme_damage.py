"""What disks do to the NVMe tier's files, and what they refuse: pages are lost, alone, and none is ever wrong."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from kvd.storage import failpoints
from kvd.storage.nvme import NvmeTier
from kvd.storage.nvme.catalog import HEAD_BYTES, Catalog, Record
from kvd.storage.nvme.health import STRIKES
from kvd.storage.nvme.segments import Segments
from kvd.storage.tier import Buffers, Page, TierError
from tests.failpoint_names import failpoint_names
from tests.nvme_folder import (
    LENGTH,
    MIB,
    SEGMENT,
    absent_or_right,
    catalog,
    fill,
    opened,
    reopened,
    segment,
)
from tests.tier_samples import Sample, get, held, put, sample


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


# -- damage ------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed_counted_and_said(tmp_path: Path) -> None:
    samples = fill(tmp_path)
    with segment(tmp_path, 1).open("r+b") as file:
        file.seek(4096 + 2 * 61440 + 59_999)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 0x40]))
    with reopened(tmp_path) as tier:
        there = absent_or_right_after_first_read(tier, samples)
        assert there.count(False) == 1
        assert tier.counters["damaged"] == 1
        assert tier.news().left == [s.page.name for s, is_there in zip(samples, there, strict=True) if not is_there]
        lost = samples[there.index(False)]
        assert put(tier, lost) == [True]
        assert get(tier, lost) == [lost]


def absent_or_right_after_first_read(tier: NvmeTier, samples: list[Sample]) -> list[bool]:
    """Damage is found by reading, so names and find are right after that."""
    get(tier, *samples)
    return absent_or_right(tier, samples)


def test_what_is_beyond_a_pages_length_is_nobodys(tmp_path: Path) -> None:
    samples = fill(tmp_path, 1)
    with segment(tmp_path, 0).open("r+b") as file:
        file.seek(4096 + LENGTH)
        file.write(b"\xff" * (61440 - LENGTH))
    with reopened(tmp_path) as tier:
        assert absent_or_right(tier, samples) == [True]


@pytest.mark.parametrize("kept", [0, 100, 4096, 4096 + 61440 * 3 + 5, SEGMENT - 1])
def test_a_truncated_segment_loses_its_pages_only(tmp_path: Path, kept: int) -> None:
    samples = fill(tmp_path)
    os.truncate(segment(tmp_path, 2), kept)
    with reopened(tmp_path) as tier:
        there = absent_or_right(tier, samples)
        assert 40 <= sum(there) < 60
        assert tier.counters["dropped_at_open"] == 60 - sum(there)
        assert len(tier.news().left) == 60 - sum(there)
        assert all(put(tier, *samples))
        assert all(absent_or_right(tier, samples))


def test_a_segment_truncated_while_open_gives_misses(tmp_path: Path) -> None:
    samples = fill(tmp_path)
    with reopened(tmp_path) as tier:
        os.truncate(segment(tmp_path, 0), 4096)
        there = absent_or_right_after_first_read(tier, samples)
        assert 40 <= sum(there) < 60
        assert tier.counters["damaged"] == 60 - sum(there)


@pytest.mark.parametrize("start", [0, 4096])
def test_a_zeroed_segment_loses_its_pages_only(tmp_path: Path, start: int) -> None:
    samples = fill(tmp_path)
    with segment(tmp_path, 1).open("r+b") as file:
        file.seek(start)
        file.write(bytes(SEGMENT - start))
    with reopened(tmp_path) as tier:
        assert 40 <= sum(absent_or_right_after_first_read(tier, samples)) < 60


def test_swapped_and_foreign_segments_are_noticed(tmp_path: Path) -> None:
    samples = fill(tmp_path / "ours")
    fill(tmp_path / "other")
    zero, one = segment(tmp_path / "ours", 0), segment(tmp_path / "ours", 1)
    zero.rename(tmp_path / "aside")
    one.rename(zero)
    (tmp_path / "aside").rename(one)
    shutil.copy(segment(tmp_path / "other", 2), segment(tmp_path / "ours", 2))
    with reopened(tmp_path / "ours") as tier:
        there = absent_or_right(tier, samples)
        assert 0 < sum(there) < 20, "what was in segment 3"
        assert all(put(tier, *samples))


def test_a_missing_segment_loses_its_pages_only(tmp_path: Path) -> None:
    samples = fill(tmp_path)
    segment(tmp_path, 0).unlink()
    with reopened(tmp_path) as tier:
        assert 40 <= sum(absent_or_right(tier, samples)) < 60


def test_segments_without_their_catalog_are_used_anew(tmp_path: Path) -> None:
    samples = fill(tmp_path)
    shutil.rmtree(tmp_path / "catalog")
    with reopened(tmp_path) as tier:
        assert not any(absent_or_right(tier, samples))
        assert all(put(tier, *samples))
        assert all(absent_or_right(tier, samples))


def test_damaged_records_cost_their_pages_and_never_mix_others(tmp_path: Path) -> None:
    samples = fill(tmp_path)
    rng = random.Random(5)
    with catalog(tmp_path, write=True) as (writing, pages, _):
        for what in samples[:40]:
            value = bytearray(writing.get(what.page.name, db=pages))
            value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
            writing.put(what.page.name, bytes(value), db=pages)
        writing.put(samples[40].page.name, b"short", db=pages)
        writing.put(samples[41].page.name, bytes(HEAD_BYTES + 16), db=pages)
        writing.put(samples[42].page.name, writing.get(samples[43].page.name, db=pages), db=pages)
        writing.put(b"no name", b"x" * 100, db=pages)
    tier = opened(tmp_path)
    get(tier, *samples)
    tier.close()  # a slot whose record was damaged is free again only now
    with reopened(tmp_path) as tier:
        there = absent_or_right(tier, samples)
        assert sum(there[44:]) >= 14, "where two claim a slot both go"
        assert sum(there) <= 17
        assert all(put(tier, *samples))
        assert all(absent_or_right(tier, samples))


@pytest.mark.parametrize(
    "shards", [lambda n: 1, lambda n: 1 + n % 3, lambda n: 1 + n // 700], ids=["one", "all", "runs"]
)
@pytest.mark.parametrize("odd", [(), (0, 500, 1999), range(0, 2000, 2), range(2000)], ids=len)
def test_all_records_are_read_whatever_their_shape(
    tmp_path: Path, shards: Callable[[int], int], odd: Sequence[int]
) -> None:
    rng = random.Random(6)
    names = sorted(rng.randbytes(48) for _ in range(2000))
    good, short = set(range(2000)) - set(odd), {names[n] for n in odd}
    pages = {n: Page(names[n][:16], names[n][16:], rng.randbytes(32), 5000, (bytes(16),) * shards(n)) for n in good}
    found = Catalog(tmp_path / "catalog", SEGMENT, 1 << 30)
    try:
        assert found.commit([Record(n, n + 1, page) for n, page in pages.items()])
        with found._env.begin(write=True, db=found._pages) as writing:
            for name in short:
                writing.put(name, bytes(HEAD_BYTES - 1))
        pieces = list(found.heads())
    finally:
        found.close()
    assert {name for piece in pieces for name in piece.odd} == short
    rows = [row for p in pieces for row in zip(map(bytes, p.names), p.heads["slot"], p.heads["shards"], strict=True)]
    assert rows == [(names[n], n, shards(n)) for n in sorted(good)]


# -- disks that fail ---------------------------------------------------------------------------------------


def test_a_write_that_fails_costs_its_page_only(tmp_path: Path) -> None:
    samples = [sample(n, LENGTH + 4096 * n) for n in range(6)]  # each in a segment of its own
    with reopened(tmp_path) as tier:
        failpoints.arm("segments.write:3:eio")
        assert sorted(put(tier, *samples)) == [False] + [True] * 5
        assert tier.counters["write_error"] == 1
        assert put(tier, *samples) == [True] * 6
        assert all(absent_or_right(tier, samples))


def test_neighbours_that_could_not_be_written_together_are_written_one_by_one(tmp_path: Path) -> None:
    samples = [sample(n, LENGTH) for n in range(6)]
    with reopened(tmp_path) as tier:
        failpoints.arm("segments.write:1:eio")
        assert put(tier, *samples) == [True] * 6
        assert tier.counters["write_error"] == 0
    with reopened(tmp_path) as tier:
        assert get(tier, *samples) == samples


def test_a_barrier_that_fails_acknowledges_nothing(tmp_path: Path) -> None:
    samples = [sample(n, LENGTH) for n in range(6)]
    with reopened(tmp_path) as tier:
        failpoints.arm("segments.sync:1:eio")
        assert put(tier, *samples) == [False] * 6
        assert not any(absent_or_right(tier, samples))


def test_a_page_that_cannot_be_read_is_a_miss_from_then_on(tmp_path: Path) -> None:
    samples = fill(tmp_path, 6)
    with reopened(tmp_path) as tier:
        failpoints.arm("segments.read:2:eio")
        found = get(tier, *samples)
        assert found.count(None) == 1
        assert (tier.counters["read_error"], tier.counters["damaged"]) == (1, 0)
        assert tier.news().left == [what.page.name for what, got in zip(samples, found, strict=True) if got is None]
        assert get(tier, *samples) == found
        assert put(tier, *samples) == [True] * 6
        assert get(tier, *samples) == samples


def test_one_bad_sector_under_a_page_that_all_want_does_not_take_the_tier_down(tmp_path: Path) -> None:
    samples = fill(tmp_path, 6)
    with reopened(tmp_path) as tier:
        bad = next(record for record in tier._ledger.records([samples[3].page.name]) if record).slot
        with a_bad_sector(bad):
            for _ in range(2 * STRIKES):
                assert get(tier, samples[3]) == [None]
            assert get(tier, *samples) == [*samples[:3], None, *samples[4:]]


def test_a_bad_sector_on_a_disk_too_full_to_forget_it_costs_its_page_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = fill(tmp_path, 6)
    with reopened(tmp_path) as tier:
        bad = next(record for record in tier._ledger.records([samples[3].page.name]) if record).slot
        monkeypatch.setattr(tier._catalog, "commit", lambda *_: False)  # as it says of a full disk
        with a_bad_sector(bad):
            for _ in range(2 * STRIKES):
                assert get(tier, *samples) == [*samples[:3], None, *samples[4:]]


def test_calls_in_which_some_of_it_worked_do_not_take_the_tier_down(tmp_path: Path) -> None:
    with reopened(tmp_path) as tier:
        for n in range(STRIKES + 1):
            failpoints.arm("segments.write:1:eio")
            what = sample(n, LENGTH), sample(100 + n, 2 * LENGTH)  # each in a segment of its own
            assert sorted(put(tier, *what)) == [False, True]


@contextmanager
def a_bad_sector(slot: int) -> Iterator[None]:
    """That slot cannot be read."""
    read = Segments.read

    def refused(self: Segments, at: int, buffers: Buffers) -> bool:
        if at == slot:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, at, buffers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segments, "read", refused)
        yield


def test_a_disk_that_keeps_failing_takes_the_tier_down_until_it_works(tmp_path: Path) -> None:
    samples = fill(tmp_path, STRIKES + 1)
    with reopened(tmp_path) as tier:
        failpoints.arm("segments.read:1+:eio")
        for what in samples[: STRIKES - 1]:
            assert get(tier, what) == [None]
        with pytest.raises(TierError, match="failed in 5 calls"):
            get(tier, samples[STRIKES - 1])
        failpoints.arm("")
        assert get(tier, samples[STRIKES]) == [samples[STRIKES]]
        assert not tier._health.strikes


@pytest.mark.parametrize("fault", ["eio", "enospc"])
def test_no_step_that_fails_raises_what_is_no_tier_error_or_loses_a_page(tmp_path: Path, fault: str) -> None:
    """The first time of each step fails, in a tier that evicts and removes; then it is opened again."""
    for name in failpoint_names("nvme"):
        folder = tmp_path / name
        stored: set[Sample] = set()
        failpoints.arm(f"{name}:1:{fault}")
        with suppress(TierError), closing(opened(folder, 2 * MIB)) as tier:
            _exercise(tier, stored)
        failpoints.arm("")
        with reopened(folder, 2 * MIB) as tier:
            assert all(get(tier, what)[0] in (None, what) for what in stored)
            assert put(tier, sample(999, LENGTH)) == [True]


def _exercise(tier: NvmeTier, stored: set[Sample]) -> None:
    """Whenever the tier answers, what it holds is what it said it held, less what it said has left."""
    there = {name for piece in tier.names() for name in piece}
    tier.news()
    for at in range(0, 48, 6):
        batch = [sample(n, LENGTH) for n in range(at, at + 6)]
        answers = put(tier, *batch)
        stored |= set(batch)
        there |= {what.page.name for what, ok in zip(batch, answers, strict=True) if ok}
        tier.remove([batch[0].page.name])
        there.discard(batch[0].page.name)
        get(tier, *batch)
        there -= set(tier.news().left)
        assert held(tier) == there
