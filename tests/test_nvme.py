"""The NVMe tier: the contract of all tiers, its formats, and what only this tier promises."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from kvd.storage import failpoints
from kvd.storage.nvme import NvmeTier
from kvd.storage.nvme.catalog import META, Record, pack, unpack
from kvd.storage.tier import Tier, TierError
from tests.nvme_folder import LENGTH, MIB, SEGMENT, absent_or_right, catalog, fill, opened, reopened, segment
from tests.tier_contract import TierContract
from tests.tier_machine import tier_machine
from tests.tier_samples import Sample, get, held, put, sample


class TestNvme(TierContract):
    def open(self, folder: Path) -> Tier:
        return NvmeTier(folder, 32 * MIB, 2 * MIB)


TestNvmeMachine = tier_machine(lambda folder: NvmeTier(folder, 12 * MIB, 2 * MIB), examples=8).TestCase
TestNvmeMachineLong = pytest.mark.timeout(1800)(
    pytest.mark.slow(tier_machine(lambda folder: NvmeTier(folder, 12 * MIB, 2 * MIB), 400).TestCase)
)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


# -- formats -----------------------------------------------------------------------------------------------


def test_the_bytes_on_the_disk_are_as_drawn(tmp_path: Path) -> None:
    what = sample(7, 5000, 2)
    with reopened(tmp_path) as tier:
        put(tier, what)
    raw = segment(tmp_path, 0).read_bytes()
    assert len(raw) == SEGMENT
    assert raw[:8] == b"KVDSEGMT"
    assert (raw[8:12], raw[12:16]) == ((1).to_bytes(4, "little"), bytes(4))
    assert (raw[32:40], raw[40:44]) == ((16384).to_bytes(8, "little"), (63).to_bytes(4, "little"))
    assert raw[48:56] == xxhash.xxh3_64_intdigest(raw[:48]).to_bytes(8, "little")
    assert raw[4096 : 4096 + 5000] == what.data[0]
    assert raw[4096 + 8192 : 4096 + 8192 + 5000] == what.data[1]
    with catalog(tmp_path) as (reading, pages, meta):
        value, form = reading.get(what.page.name, db=pages), reading.get(b"format", db=meta)
    assert form[:12] == b"KVDNVME\0" + (1).to_bytes(4, "little")
    assert form[16:32] == raw[16:32], "segments carry the catalog's uuid"
    assert value[:8] == bytes(8), "segment 0, position 0"
    assert value[8:16] == (5000).to_bytes(4, "little") + (16).to_bytes(4, "little")
    assert (value[24:26], value[32:64]) == ((2).to_bytes(2, "little"), what.page.parent)
    assert value[64:72] == xxhash.xxh3_64_intdigest(what.page.name + value[:64] + value[72:]).to_bytes(8, "little")
    assert value[72:] == b"".join(what.page.checksums)


def test_a_record_with_any_byte_changed_is_not_taken_for_one() -> None:
    page = sample(3, 5000, 3).page
    value = pack(Record(5 << 20 | 7, 99, page))
    assert unpack(page.name, value) == Record(5 << 20 | 7, 99, page)
    for at in range(len(value)):
        assert unpack(page.name, value[:at] + bytes([value[at] ^ 1 << at % 8]) + value[at + 1 :]) is None
    for length in range(len(value)):
        assert unpack(page.name, value[:length]) is None
    assert unpack(sample(4).page.name, value) is None


# -- what is refused ---------------------------------------------------------------------------------------


def refused(folder: Path, match: str, size_bytes: int = 8 * MIB, segment_bytes: int = SEGMENT) -> None:
    with pytest.raises(TierError, match=match) as caught:
        NvmeTier(folder, size_bytes, segment_bytes)
    assert caught.value.hint


def test_another_process_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with reopened(tmp_path) as tier:
        refused(tmp_path, "in use by another process")
        assert put(tier, sample(1)) == [True]
    with reopened(tmp_path) as tier:
        assert get(tier, sample(1)) == [sample(1)]


def test_another_format_or_geometry_is_refused_with_its_remedy(tmp_path: Path) -> None:
    samples = fill(tmp_path, 3)
    refused(tmp_path, "segments of 1048576 bytes, not 2097152", segment_bytes=2 * MIB)
    with catalog(tmp_path, write=True) as (writing, _, meta):
        good = writing.get(b"format", db=meta)
        writing.put(b"format", good[:8] + (9).to_bytes(4, "little") + good[12:] + b"more", db=meta)
    refused(tmp_path, "has format 9, this kvd knows 1")
    with catalog(tmp_path, write=True) as (writing, _, meta):
        writing.put(b"format", bytes(META.size), db=meta)
    refused(tmp_path, "not a folder of kvd")
    with catalog(tmp_path, write=True) as (writing, _, meta):
        writing.put(b"format", good, db=meta)
    with reopened(tmp_path) as tier:
        assert all(absent_or_right(tier, samples))


def test_what_is_no_catalog_is_refused(tmp_path: Path) -> None:
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / "data.mdb").write_bytes(b"hello" * 5000)
    refused(tmp_path, "cannot open the catalog")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "cannot use")
    refused(tmp_path, "hold no segment", size_bytes=SEGMENT - 1)


def test_a_closed_tier_says_so(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    tier.close()
    for call in (tier.usage, tier.news, lambda: tier.put([]), lambda: tier.get([]), lambda: list(tier.names())):
        with pytest.raises(TierError, match="closed"):
            call()


# -- room --------------------------------------------------------------------------------------------------


def test_a_tier_made_smaller_keeps_what_fits_and_one_made_larger_keeps_all(tmp_path: Path) -> None:
    samples = fill(tmp_path)
    with reopened(tmp_path, 2 * MIB) as tier:
        there = absent_or_right(tier, samples)
        assert 30 <= sum(there) <= 34
        assert len(tier.news().left) == 60 - sum(there)
        assert tier.usage().bytes_total == 2 * MIB
    assert not segment(tmp_path, 2).exists()
    with reopened(tmp_path, 16 * MIB) as tier:
        assert absent_or_right(tier, samples) == there
        assert all(put(tier, *samples))
        assert all(absent_or_right(tier, samples))


def test_when_no_segment_can_be_made_the_tier_works_with_those_it_has(tmp_path: Path) -> None:
    samples = [sample(n, LENGTH) for n in range(64)]
    with reopened(tmp_path) as tier:
        assert all(put(tier, *samples[:20]))
        failpoints.arm("segments.create.after_allocate:1+:enospc")
        for at in range(20, 64, 4):
            assert all(put(tier, *samples[at : at + 4]))
        assert tier.counters["disk_full"] == 1, "not asked again at once"
        assert not segment(tmp_path, 2).exists()
        assert tier.usage().bytes_total == 2 * MIB
        left = set(tier.news().left)
        assert [s.page.name not in left for s in samples] == absent_or_right(tier, samples)
    failpoints.arm("")
    with reopened(tmp_path) as tier:
        assert all(put(tier, *samples))
        assert tier.usage().bytes_total == 8 * MIB


def test_a_disk_that_was_full_from_the_start_stores_nothing_and_harms_nothing(tmp_path: Path) -> None:
    failpoints.arm("segments.create.after_open:1+:enospc")
    with reopened(tmp_path) as tier:
        assert put(tier, sample(1), sample(2)) == [False, False]
        assert get(tier, sample(1)) == [None]
        assert tier.counters["no_room"] == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_really_full_disk_costs_capacity_only(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        samples = [sample(n, LENGTH) for n in range(200)]
        said = set()
        with reopened(tmp_path / "tier", 64 * MIB) as tier:
            stored = [s for at in range(0, 200, 5) for s in _stored(tier, samples[at : at + 5])]
            said |= set(tier.news().left)
            assert tier.counters["disk_full"] >= 1
            assert len(stored) > 30
            assert all(get(tier, s) == [s] for s in stored if s.page.name not in said)
            assert held(tier) == {s.page.name for s in stored} - said
        with reopened(tmp_path / "tier", 64 * MIB) as tier:
            assert all(get(tier, s) == [s] for s in stored if s.page.name not in said)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _stored(tier: NvmeTier, samples: list[Sample]) -> list[Sample]:
    return [what for what, ok in zip(samples, put(tier, *samples), strict=True) if ok]


def test_a_page_larger_than_a_segment_is_not_wanted(tmp_path: Path) -> None:
    with reopened(tmp_path) as tier:
        assert put(tier, sample(1, SEGMENT - 4095), sample(2, SEGMENT - 4096)) == [False, True]
        assert get(tier, sample(2, SEGMENT - 4096)) == [sample(2, SEGMENT - 4096)]


def test_other_sizes_under_a_held_name_replace_it(tmp_path: Path) -> None:
    with reopened(tmp_path) as tier:
        for length, shards in ((5000, 1), (9000, 1), (9000, 3), (100, 2)):
            what = sample(1, length, shards)
            assert put(tier, what, sample(2)) == [True, True]
            assert get(tier, what) == [what]
            assert tier.usage().pages == 2
            assert not tier.faults()
        assert tier.news() == ([], [])


def test_a_replaced_page_whose_old_slot_went_for_its_own_room_is_held_once(tmp_path: Path) -> None:
    """Room for the new sizes takes the old page's slot, or its whole segment, before the new one is committed."""
    for count, lengths in ((1, (LENGTH, 2 * LENGTH)), (16, (LENGTH, 2 * LENGTH)), (16, (2 * LENGTH, LENGTH))):
        with reopened(tmp_path / f"{count}-{lengths[0]}", SEGMENT) as tier:
            assert any(put(tier, *[sample(n, lengths[0]) for n in range(count)]))
            what = [sample(n, lengths[1]) for n in range(count)]
            stored = [page for page, ok in zip(what, put(tier, *what), strict=True) if ok]
            assert stored
            assert not tier.faults()
            others = [sample(n, lengths[1]) for n in range(100, 104)]
            put(tier, *others)
            left = set(tier.news().left)
            assert get(tier, *stored) == [None if page.page.name in left else page for page in stored]
            assert tier.counters["damaged"] == 0


def test_a_page_that_left_for_others_of_its_own_put_is_not_said_to_be_held(tmp_path: Path) -> None:
    with reopened(tmp_path, SEGMENT) as tier:
        known = [sample(n, LENGTH) for n in range(16)]
        assert all(put(tier, *known))
        batch = [*known, *[sample(n, LENGTH) for n in range(100, 116)]]
        answers = put(tier, *batch)
        assert [page is not None for page in tier.find([what.page.name for what in batch])] == answers
        assert absent_or_right(tier, batch) == answers


def test_what_was_read_lately_stays_longer(tmp_path: Path) -> None:
    with reopened(tmp_path, 2 * MIB) as tier:
        loved = [sample(n, LENGTH) for n in range(8)]
        put(tier, *loved)
        for at in range(100, 200, 4):
            assert get(tier, *loved) == loved
            assert all(put(tier, *[sample(n, LENGTH) for n in range(at, at + 4)]))
        assert not {s.page.name for s in loved} & set(tier.news().left)


def test_room_goes_to_the_size_that_is_written_now(tmp_path: Path) -> None:
    with reopened(tmp_path) as tier:
        old = [sample(n, LENGTH) for n in range(120)]
        for at in range(0, 120, 8):
            put(tier, *old[at : at + 8])
        new = [sample(n, 120_000) for n in range(200, 260)]
        for at in range(0, 60, 4):
            assert all(put(tier, *new[at : at + 4]))
        assert sum(page is not None for page in tier.find([s.page.name for s in new])) > 40
        assert all(put(tier, *old[:8])), "and back"
        left = set(tier.news().left)
        assert held(tier) == {s.page.name for s in old + new} - left | {s.page.name for s in old[:8]}


def test_a_full_tier_stores_a_batch_with_one_commit(tmp_path: Path) -> None:
    with reopened(tmp_path) as tier:
        batches = iter([sample(n, LENGTH) for n in range(at, at + 4)] for at in range(0, 1000, 4))
        while not tier.news().left:
            put(tier, *next(batches))
        before = tier._catalog._env.info()["last_txnid"]
        for _ in range(20):
            assert all(put(tier, *next(batches)))
        assert tier._catalog._env.info()["last_txnid"] - before == 20
        assert tier.counters["evicted"] >= 80
