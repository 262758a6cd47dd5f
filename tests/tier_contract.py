"""What every tier below RAM must do, whatever it is made of: `storage/tier.py` as tests.

    class TestNvme(TierContract):                          every promise, one test each
        def open(self, folder: Path) -> Tier: ...

`open` opens what is in `folder`, or starts there; it is called again for the same folder after `close`. The tier must
have room for ROOM_BYTES of pages in slots of their own, and may evict beyond that.
"""

import mmap
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.storage.tier import Name, Page, Tier
from tests.tier_samples import ALIGN, Sample, filled, get, held, put, room, sample

ROOM_BYTES = 8 << 20


class TierContract(ABC):
    """Inherit, add `open`."""

    @abstractmethod
    def open(self, folder: Path) -> Tier:
        """The tier of this folder."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = self.open(tmp_path / "tier")
        yield tier
        tier.close()

    def test_what_was_put_comes_back(self, tier: Tier) -> None:
        samples = [sample(n) for n in range(20)]
        assert put(tier, *samples) == [True] * 20
        assert get(tier, *samples) == samples
        assert tier.find([s.page.name for s in samples]) == [s.page for s in samples]

    def test_what_was_not_put_is_absent(self, tier: Tier) -> None:
        put(tier, sample(1))
        assert get(tier, sample(2), sample(1), sample(3)) == [None, sample(1), None]
        assert tier.find([sample(2).page.name, sample(1).page.name]) == [None, sample(1).page]

    def test_nothing_asked_is_nothing_done(self, tier: Tier) -> None:
        assert (tier.put([]), tier.get([]), tier.find([])) == ([], [], [])
        tier.remove([])
        assert not held(tier)

    @pytest.mark.parametrize("length", [1, 100, 4095, 4096, 4097, 65536, 100_001])
    @pytest.mark.parametrize("shards", [1, 2, 5])
    def test_lengths_and_shards(self, tier: Tier, length: int, shards: int) -> None:
        samples = [sample(n, length, shards) for n in range(3)]
        assert put(tier, *samples) == [True] * 3
        assert get(tier, *samples) == samples

    def test_many_shards(self, tier: Tier) -> None:
        assert put(tier, sample(1, 4096, 64)) == [True]
        assert get(tier, sample(1, 4096, 64)) == [sample(1, 4096, 64)]

    def test_sizes_beside_each_other_in_one_call(self, tier: Tier) -> None:
        samples = [sample(n, 1 + 3000 * n, 1 + n % 3) for n in range(12)]
        assert put(tier, *samples) == [True] * 12
        assert get(tier, *samples) == samples

    @pytest.mark.parametrize(("stored", "read"), [(False, False), (False, True), (True, False)])
    def test_buffers_need_not_be_aligned(self, tier: Tier, stored: bool, read: bool) -> None:
        samples = [sample(n, 10_000, 2) for n in range(4)]
        assert put(tier, *samples, aligned=stored) == [True] * 4
        assert get(tier, *samples, aligned=read) == samples

    def test_a_read_does_not_touch_what_is_beyond_the_buffers(self, tier: Tier) -> None:
        put(tier, sample(1, 5000))
        memory = memoryview(mmap.mmap(-1, 4 * ALIGN))
        memory[:] = b"\x5a" * len(memory)
        assert tier.get([(sample(1).page.name, [memory[ALIGN : 3 * ALIGN]])]) == [sample(1).page]
        assert memory[:ALIGN] == b"\x5a" * ALIGN == memory[3 * ALIGN :]

    def test_a_get_of_other_sizes_is_a_miss_and_harms_nothing(self, tier: Tier) -> None:
        put(tier, sample(1, 5000, 2))
        name = sample(1).page.name
        for length, shards in ((4096, 2), (20_000, 2), (5000, 1), (5000, 3), (10_000, 1)):
            assert tier.get([(name, room(length, shards))]) == [None]
        assert get(tier, sample(1, 5000, 2)) == [sample(1, 5000, 2)]

    def test_a_put_of_wrong_sizes_is_refused(self, tier: Tier) -> None:
        page, buffers = filled(sample(1, 5000, 2))
        nothing = Page(page.namespace, page.key, page.parent, 5000, ())
        empty = page._replace(length=0)
        wrong = [(page, buffers[:1]), (page, room(4096, 2)), (nothing, []), (empty, buffers)]
        good = filled(sample(2))
        assert tier.put([*wrong, good]) == [False] * 4 + [True]
        assert tier.find([page.name]) == [None]

    def test_a_page_put_twice_is_held_once(self, tier: Tier) -> None:
        assert put(tier, sample(1), sample(1), sample(2)) == [True, True, True]
        assert put(tier, sample(1)) == [True]
        assert tier.usage().pages == 2
        assert get(tier, sample(1)) == [sample(1)]

    def test_other_bytes_under_a_held_name_never_mix(self, tier: Tier) -> None:
        """Kernels are not always deterministic: the same tokens may give other bytes. Either is right, whole."""
        versions = [sample(1, 9000, 3, version) for version in range(3)]
        for version in versions:
            assert put(tier, version) == [True]
            assert get(tier, version)[0] in versions

    def test_removed_is_gone(self, tier: Tier) -> None:
        samples = [sample(n) for n in range(6)]
        put(tier, *samples)
        tier.remove([s.page.name for s in samples[:3]] + [sample(99).page.name])
        assert get(tier, *samples) == [None] * 3 + samples[3:]
        assert held(tier) == {s.page.name for s in samples[3:]}
        assert put(tier, *samples[:3]) == [True] * 3
        assert get(tier, *samples) == samples

    def test_the_callers_own_doing_is_no_news(self, tier: Tier) -> None:
        put(tier, sample(1), sample(2))
        tier.remove([sample(1).page.name])
        assert tier.news() == ([], [])

    def test_usage_and_names(self, tier: Tier) -> None:
        assert tier.usage().pages == 0
        samples = [sample(n, 20_000) for n in range(10)]
        put(tier, *samples)
        usage = tier.usage()
        assert usage.pages == 10
        assert 10 * 20_000 <= usage.bytes_used <= usage.bytes_total
        assert held(tier) == {s.page.name for s in samples}

    def test_everything_is_there_after_reopening(self, tier: Tier, tmp_path: Path) -> None:
        samples = [sample(n, 6000 + n, 1 + n % 2) for n in range(12)]
        put(tier, *samples)
        tier.remove([samples[0].page.name])
        usage = tier.usage()
        tier.close()
        again = self.open(tmp_path / "tier")
        try:
            assert again.usage().pages == usage.pages
            assert held(again) == {s.page.name for s in samples[1:]}
            assert get(again, *samples) == [None, *samples[1:]]
            assert put(again, samples[0]) == [True]
            assert get(again, *samples) == samples
        finally:
            again.close()

    def test_close_may_be_called_twice(self, tier: Tier) -> None:
        tier.close()
        tier.close()

    def test_more_than_fits_is_evicted_and_said(self, tier: Tier) -> None:
        """Until it evicts, or for four times its size: what is not in the news is there and right."""
        number, said, samples = 0, set[Name](), list[Sample]()
        limit = 4 * tier.usage().bytes_total
        while not said and number * 260_000 < limit:
            batch = [sample(n, 260_000) for n in range(number, number + 8)]
            answers = put(tier, *batch)
            samples += [s for s, stored in zip(batch, answers, strict=True) if stored]
            said |= set(tier.news().left)
            number += 8
        assert said, "a tier has an end"
        assert len(samples) * 260_000 >= ROOM_BYTES // 2
        for what in samples:
            expected = None if what.page.name in said else what
            assert get(tier, what) == [expected]
        assert held(tier) == {s.page.name for s in samples} - said

    def test_a_page_put_again_after_its_eviction_is_not_reported_as_gone(self, tier: Tier) -> None:
        first, number = sample(0, 260_000), 1
        put(tier, first)
        limit = 4 * tier.usage().bytes_total
        while tier.find([first.page.name]) != [None] and number * 260_000 < limit:
            put(tier, *[sample(n, 260_000) for n in range(number, number + 8)])
            number += 8
        assert tier.find([first.page.name]) == [None], "the oldest, never used, leaves at some time"
        assert put(tier, first) == [True]
        assert first.page.name not in tier.news().left
        assert get(tier, first) == [first]

    def test_reads_beside_writes_and_evictions_are_right_or_absent(self, tier: Tier) -> None:
        """Readers of all names while one writer overfills the tier and removes pages."""
        samples = [sample(n, 130_000, 2) for n in range(64)]
        over, wrong, hits = threading.Event(), list[str](), [0]

        def read(seed: int) -> None:
            rng = random.Random(seed)
            while not over.is_set():
                asked = rng.sample(samples, 4)
                for want, got in zip(asked, get(tier, *asked), strict=True):
                    hits[0] += got is not None
                    if got is not None and got != want:
                        wrong.append(f"{want.page.key.hex()} came back wrong")

        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for reader in readers:
            reader.start()
        rng = random.Random(0)
        try:
            for turn in range(40):
                put(tier, *rng.sample(samples, 8))
                if turn % 5 == 4:
                    tier.remove([s.page.name for s in rng.sample(samples, 4)])
        finally:
            over.set()
            for reader in readers:
                reader.join()
        assert not wrong
        assert hits[0]
