"""Many pages of a lower tier entered into the index at once: as if one after the other, also for readers."""

import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd import index
from kvd.index import ENTRY_WORDS, HEADER_WORDS, LOWER, WITHDRAWN, IndexReader, IndexWriter, Name, index_bytes

NAMESPACE = bytes(range(16))


def name(hi: int, lo: int) -> bytes:
    """Of the page that the index knows by these words."""
    key = hi.to_bytes(8, "big") + lo.to_bytes(8, "big")
    mixed = bytes(a ^ b for a, b in zip(key, NAMESPACE, strict=True))
    return NAMESPACE + mixed + bytes(16)


def places(reader: IndexReader, names: Sequence[bytes]) -> list[int | None]:
    return [reader.present(Name.of(name[:16]), name[16:].hex()) for name in names]


class Table:
    """An index; `many` decides from how many names on they are entered as arrays."""

    def __init__(self, entries: int, many: int) -> None:
        self.memory = memoryview(bytearray(index_bytes(entries)))
        self.writer, self.reader, self._many = IndexWriter(self.memory, entries, 1), IndexReader(self.memory), many

    def lower(self, names: Sequence[bytes], tier: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(index, "_MANY", self._many)
            return self.writer.publish_lower(names, tier)

    def used(self) -> list[int]:
        """What the writer counts, counted."""
        words = np.frombuffer(self.memory, np.uint64)[HEADER_WORDS:].reshape(-1, ENTRY_WORDS)
        used = words[words[:, 0] > WITHDRAWN]
        return [len(used), int((used[:, 2] >= LOWER).sum())]


# Few homes, among them the two whose first word means something else; more names than the table takes.
HOMES = (0, 1, 2, 3, 61, 62, 63, 64, 130, 1 << 63)
POOL = [name(hi, lo) for lo, hi in enumerate(5 * HOMES)]
some = st.lists(st.sampled_from(POOL), max_size=50)
steps = st.one_of(
    st.tuples(st.just("lower"), some, st.sampled_from([1, 2])),
    st.tuples(st.just("ram"), some, st.just(0)),
    st.tuples(st.just("withdraw"), some, st.just(0)),
    st.tuples(st.just("forget"), st.just([]), st.sampled_from([1, 2])),
)


@settings(deadline=None)  # the first example imports numpy
@given(st.lists(steps, max_size=12))
def test_at_once_is_as_one_after_the_other(played: list[tuple[str, list[bytes], int]]) -> None:
    tables = [Table(64, many=1), Table(64, many=1 << 30)]
    for step, names, tier in played:
        refused = []
        for table in tables:
            if step == "lower":
                refused.append(table.lower(names, tier))
            elif step == "forget":
                table.writer.withdraw_lower(tier)
            for each in names if step in ("ram", "withdraw") else []:
                if step == "ram":
                    table.writer.publish(each[:16], each[16:], 7 << 32 | 1, 3)
                else:
                    table.writer.withdraw(each[:16], each[16:])
        assert len(set(refused)) <= 1
        assert places(tables[0].reader, POOL) == places(tables[1].reader, POOL)
        for table in tables:
            assert table.used() == [len(table.writer), table.writer.lower]
        assert len(tables[0].writer) == len(tables[1].writer)


def test_names_that_all_begin_in_one_place_are_shown_as_far_as_readers_look() -> None:
    names = [name(5, lo) for lo in range(200)]
    tables = [Table(1024, many=1), Table(1024, many=1 << 30)]
    assert [table.lower(names, 1) for table in tables] == [72, 72]
    assert places(tables[0].reader, names) == places(tables[1].reader, names) == [LOWER | 1] * 128 + [None] * 72


def test_a_full_table_takes_what_it_can() -> None:
    rng = np.random.default_rng(0)
    names = [rng.bytes(48) for _ in range(1000)]
    tables = [Table(1024, many=1), Table(1024, many=1 << 30)]
    for at in range(0, 1000, 100):
        assert len({table.lower(names[at : at + 100], 1) for table in tables}) == 1
    assert places(tables[0].reader, names) == places(tables[1].reader, names)
    assert len(tables[0].writer) == 640


READER = """
import mmap, sys
from kvd.index import LOWER, IndexReader, index_bytes
from tests.test_indexmany import COUNT, ENTRIES, RAM, many_names, places
reader = IndexReader(memoryview(mmap.mmap(int(sys.argv[1]), index_bytes(ENTRIES), mmap.MAP_SHARED, mmap.PROT_READ)))
names = many_names()
print("ready", flush=True)
seen = set()
while not sys.stdin.closed and len(seen) < COUNT:
    found = places(reader, names)
    assert set(found[:RAM]) == {7 << 32 | 1}, "what is in RAM was never touched"
    assert set(found[RAM:]) <= {None, LOWER | 1, LOWER | 3}, "nothing half written"
    there = {at for at, place in enumerate(found) if place is not None}
    assert seen <= there, "what was there stays there"
    seen = there
print("all", flush=True)
"""
ENTRIES, COUNT, RAM = 1 << 15, 16_000, 1000


def many_names() -> list[bytes]:
    rng = np.random.default_rng(1)
    return [rng.bytes(48) for _ in range(COUNT)]


def test_a_reader_in_another_process_sees_whole_entries_only() -> None:
    descriptor = os.memfd_create("index")
    os.ftruncate(descriptor, index_bytes(ENTRIES))
    memory = memoryview(mmap.mmap(descriptor, index_bytes(ENTRIES)))
    writer, names = IndexWriter(memory, ENTRIES, 1), many_names()
    for each in names[:RAM]:
        assert writer.publish(each[:16], each[16:], 7 << 32 | 1, 3)
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(descriptor)], pass_fds=(descriptor,), cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for tier in (1, 2):
            for at in range(RAM, COUNT, 500):
                assert writer.publish_lower(names[at : at + 500], tier) == 0
        assert process.stdout.readline() == b"all\n"
    os.close(descriptor)
    assert (len(writer), writer.lower) == (COUNT, COUNT - RAM)
