"""kill -9 and power loss: what the NVMe tier acknowledged is there and right afterwards, and nothing else is.

A child plays puts that evict, removes and gets from a seed, and says in a pipe what it is about to do and what came of
it. The parent lets it die, at a step that persists something, at a random moment, or with its file system, opens the
tier again and compares. Only the call that was not answered may have happened or not, or have evicted.
"""

import ctypes
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest

from kvd.storage import failpoints
from kvd.storage.nvme import NvmeTier
from kvd.storage.nvme.catalog import Record
from kvd.storage.tier import Name
from tests.failpoint_names import failpoint_names
from tests.tier_samples import Sample, get, held, put, sample
from tests.xfs_disk import XfsDisk, xfs_disk

MIB = 1 << 20
KINDS = ((60_000, 1), (9_000, 2), (60_000, 1), (200_000, 2))
NUMBERS = 96
BATCH = 6


def page(number: int) -> Sample:
    length, shards = KINDS[number % len(KINDS)]
    return sample(number, length, shards)


def opened(folder: Path) -> NvmeTier:
    return NvmeTier(folder, 6 * MIB, MIB)


class Ended(NamedTuple):
    """How far a child came."""

    there: set[int]  # acknowledged, and not removed or said to have left
    doubtful: set[int]  # what the call that was not answered would store, remove or evict
    status: int


def play(folder: Path, seed: int, steps: int, failpoint: str, out: int) -> None:
    """The child. Says each step before and after it."""
    samples = [page(n) for n in range(NUMBERS)]
    numbers = {what.page.name: n for n, what in enumerate(samples)}
    rng = random.Random(seed)
    failpoints.arm(failpoint)

    def say(word: str, *these: int) -> None:
        os.write(out, f"{word} {' '.join(map(str, these))}\n".encode())

    def commit(insert: Sequence[Record] = (), delete: Sequence[Name] = ()) -> bool:
        say("trying", *(numbers[name] for name in delete))
        return really_commit(insert, delete)

    with closing(opened(folder)) as tier:
        really_commit = tier._catalog.commit
        tier._catalog.commit = commit  # type: ignore[method-assign]
        say("left", *(numbers[name] for name in tier.news().left))
        for _ in range(steps):
            chosen = rng.sample(range(NUMBERS), BATCH)
            say("trying", *chosen)
            if rng.random() < 0.25:
                tier.remove([samples[n].page.name for n in chosen])
                say("left", *chosen)
            else:
                answers = put(tier, *[samples[n] for n in chosen])
                say("stored", *(n for n, ok in zip(chosen, answers, strict=True) if ok))
                say("left", *(numbers[name] for name in tier.news().left))
            get(tier, *[samples[n] for n in rng.sample(range(NUMBERS), 3)])


class Child:
    """A process that plays, and what it says."""

    def __init__(self, folder: Path, seed: int, steps: int, failpoint: str = "") -> None:
        self._said, out = os.pipe()
        arguments = (folder, seed, steps, failpoint, out)
        self._process = get_context("fork").Process(target=play, args=arguments)
        self._process.start()
        os.close(out)

    def end(self, before: set[int]) -> Ended:
        """Until its end, which must be near. A line counts when it is whole."""
        with os.fdopen(self._said, "rb") as file:
            said = file.read()
        self._process.join()
        status = self._process.exitcode
        self._process.close()
        there, doubtful = set(before), set[int]()
        for line in said.decode().split("\n")[:-1]:
            word, *rest = line.split()
            these = set(map(int, rest))
            if word == "trying":
                doubtful |= these
            elif word == "stored":
                there |= these
            else:
                there, doubtful = there - these, set()
        assert status is not None
        return Ended(there, doubtful, status)

    def kill(self) -> None:
        self._process.kill()


def check(folder: Path, end: Ended) -> set[int]:
    """Open again and compare; what is there then."""
    with closing(opened(folder)) as tier:
        assert not tier.faults()
        got = [get(tier, page(n))[0] for n in range(NUMBERS)]
        assert all(found in (None, page(n)) for n, found in enumerate(got)), "wrong bytes"
        there = {n for n, found in enumerate(got) if found is not None}
        assert held(tier) == {page(n).page.name for n in there}
        assert not tier.counters["damaged"], "a record without its payload"
        assert not there - end.there - end.doubtful, "what was removed, evicted or never put is there"
        assert not end.there - there - end.doubtful, "acknowledged, and lost"
        assert put(tier, page(0)) == [True]
        return {n for n in range(NUMBERS) if page(n).page.name in held(tier)}


def kill_at(folder: Path, name: str, nth: int, seed: int, before: set[int]) -> tuple[Ended, set[int]]:
    end = Child(folder, seed, 30, f"{name}:{nth}:kill").end(before)
    assert end.status in (-signal.SIGKILL, 0), end
    return end, check(folder, end)


DROPS = "nvme.open.before_drop"  # reached only where records are void


@pytest.mark.parametrize("name", [name for name in failpoint_names("nvme") if name != DROPS])
def test_killed_at_this_step_nothing_acknowledged_is_lost(tmp_path: Path, name: str) -> None:
    """The first time, in a fresh folder; then the second time, in what that left."""
    end, there = kill_at(tmp_path, name, 1, 1, set())
    assert end.status == -signal.SIGKILL, f"{name} was never reached"
    kill_at(tmp_path, name, 2, 2, there)


def test_killed_while_void_records_are_dropped_the_rest_is_there(tmp_path: Path) -> None:
    there = check(tmp_path, Child(tmp_path, 1, 10).end(set()))
    (tmp_path / "segment-00000.kvd").unlink()
    end = Child(tmp_path, 2, 1, f"{DROPS}:1:kill").end(there)
    assert end.status == -signal.SIGKILL
    after = check(tmp_path, end._replace(doubtful=there))
    assert 0 < len(after) < len(there)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_steps_for_a_long_time(tmp_path: Path) -> None:
    rng, there, killed = random.Random(7), set[int](), 0
    for seed in range(240):
        name = rng.choice([n for n in failpoint_names("nvme") if "create" not in n])
        end, there = kill_at(tmp_path, name, rng.randrange(1, 25), seed, there)
        killed += end.status != 0
    assert killed > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_for_a_long_time(tmp_path: Path) -> None:
    rng, there = random.Random(8), set[int]()
    for seed in range(200):
        process = Child(tmp_path, seed, 10_000)
        time.sleep(0.05 + rng.random() / 4)  # the moment is the point here
        process.kill()
        there = check(tmp_path, process.end(there))


# -- power loss --------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[XfsDisk]:
    with xfs_disk(tmp_path) as disk:
        yield disk


def lose_power(disk: XfsDisk, seed: int, there: set[int], seconds: float) -> set[int]:
    """Run a child, let the kernel write back some pages out of order, shut the file system down, mount it again."""
    folder = disk.mount_point / "tier"
    process = Child(folder, seed, 10_000)
    rng, until = random.Random(seed), time.monotonic() + seconds
    libc = ctypes.CDLL(None, use_errno=True)
    while time.monotonic() < until:
        catalog = folder / "catalog" / "data.mdb"
        if catalog.exists():
            descriptor = os.open(catalog, os.O_RDWR)
            at = rng.randrange(max(1, os.fstat(descriptor).st_size)) // 65536 * 65536
            libc.sync_file_range(descriptor, ctypes.c_int64(at), ctypes.c_int64(65536), 7)
            os.close(descriptor)
        time.sleep(0.002)
    disk.cut()
    process.kill()
    end = process.end(there)
    disk.power_up()
    return check(folder, end)


def test_acknowledged_pages_survive_power_loss(disk: XfsDisk) -> None:
    there = set[int]()
    for seed in range(4):
        there = lose_power(disk, seed, there, 0.5 + seed / 4)
    assert len(there) > 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", [1000, 2000, 3000])
def test_acknowledged_pages_survive_power_loss_for_a_long_time(disk: XfsDisk, first: int) -> None:
    rng, there = random.Random(first), set[int]()
    for seed in range(first, first + 75):
        there = lose_power(disk, seed, there, 0.3 + rng.random() * 0.7)
