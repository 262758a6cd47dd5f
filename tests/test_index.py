"""The shared lookup index: never more than is there, leading runs exact, readers beside a writer."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.index import LOWER, IndexReader, IndexWriter, Match, Name, entries_for, index_bytes, leading_run
from kvd.pages import chain

NAMESPACE = bytes(range(16))


def make(entries: int = 1024) -> tuple[IndexWriter, IndexReader]:
    memory = memoryview(bytearray(index_bytes(entries)))
    return IndexWriter(memory, entries, 7), IndexReader(memory)


def test_what_was_published_is_found_and_what_was_withdrawn_is_not() -> None:
    writer, reader = make()
    keys = chain(range(640), 16)
    for n, key in enumerate(keys):
        assert writer.publish(NAMESPACE, key, n << 32 | 1, n)
    name, hexes = Name.of(NAMESPACE), [key.hex() for key in keys]
    assert reader.leading(name, hexes) == Match(40, (39 << 32 | 1,))
    assert reader.leading(Name.of(bytes(16)), hexes) == Match(0, ())
    for key in keys[25:][::-1]:
        writer.withdraw(NAMESPACE, key)
    assert reader.leading(name, hexes).pages == 25
    assert len(writer) == 25


def test_a_page_that_moves_to_a_lower_tier_and_back_keeps_one_entry() -> None:
    writer, reader = make()
    keys = chain(range(160), 16)
    name, hexes = Name.of(NAMESPACE), [key.hex() for key in keys]
    for n, key in enumerate(keys):
        writer.publish(NAMESPACE, key, n << 32 | 1, n)
    for key in keys[5:]:
        assert writer.publish(NAMESPACE, key, LOWER | 1, 0)
    match = reader.leading(name, hexes)
    assert (match.pages, match.lower) == (10, True)
    assert not reader.leading(name, hexes[:5]).lower
    assert (len(writer), writer.lower) == (10, 5)
    for n, key in enumerate(keys):
        writer.publish(NAMESPACE, key, n << 32 | 2, n)
    assert reader.leading(name, hexes) == Match(10, (9 << 32 | 2,))
    assert (len(writer), writer.lower) == (10, 0)
    for key in keys:
        writer.withdraw(NAMESPACE, key)
        writer.withdraw(NAMESPACE, key)
    assert (len(writer), reader.leading(name, hexes).pages) == (0, 0)


def test_a_full_table_refuses_instead_of_losing_pages() -> None:
    writer, reader = make(1024)
    keys = [random.Random(n).randbytes(32) for n in range(1024)]
    taken = [key for key in keys if writer.publish(NAMESPACE, key, 1, 0)]
    assert 512 <= len(taken) < 1024
    assert all(reader.present(Name.of(NAMESPACE), key.hex()) for key in taken)


def test_long_use_does_not_fill_the_table_with_withdrawn_entries() -> None:
    writer, reader = make(1024)
    rng = random.Random(1)
    live: dict[bytes, int] = {}
    for n in range(20_000):
        key = rng.randbytes(32)
        assert writer.publish(NAMESPACE, key, n, 0), f"no room after {n} pages with {len(live)} live"
        live[key] = n
        if len(live) > 300:
            gone = rng.choice(list(live))
            writer.withdraw(NAMESPACE, gone)
            del live[gone]
    name = Name.of(NAMESPACE)
    assert {key: reader.present(name, key.hex()) for key in live} == live


def test_memory_that_is_not_an_index_is_refused() -> None:
    with pytest.raises(ValueError, match="not a kvd index"):
        IndexReader(memoryview(bytearray(4096)))
    memory = memoryview(bytearray(index_bytes(1024)))
    IndexWriter(memory, 1024, 1)
    with pytest.raises(ValueError, match="cut short"):
        IndexReader(memory[: index_bytes(512)])


@pytest.mark.parametrize(("groups", "entries"), [(1, 1024), (1024, 2048), (1025, 4096)])
def test_the_table_is_at_most_half_full(groups: int, entries: int) -> None:
    assert entries_for(groups) == entries


@given(st.lists(st.booleans(), max_size=80), st.data())
def test_the_leading_run_is_exact_whatever_is_missing(present: list[bool], data: st.DataObject) -> None:
    """`depth` never claims more than is there; it may claim less, when parents arrived after their children."""
    depth = []
    for i, there in enumerate(present):
        most = depth[i - 1] + 1 if there and i and present[i - 1] else 0
        depth.append(data.draw(st.sampled_from([0, most])) if there else 0)

    probed: list[int] = []

    def probe(i: int) -> tuple[int, int] | None:
        probed.append(i)
        return (i, depth[i]) if present[i] else None

    match = leading_run(len(present), probe)
    truth = next((i for i, there in enumerate(present) if not there), len(present))
    assert match.pages == truth
    held = {j for tip in match.tips for j in range(tip - depth[tip], tip + 1)}
    assert held >= set(range(truth))
    assert len(probed) <= 4 * len(present) + 4


def test_a_whole_chain_costs_logarithmically_many_probes() -> None:
    calls = 0

    def probe(i: int) -> tuple[int, int] | None:
        nonlocal calls
        calls += 1
        return (i, i) if i < 5000 else None

    assert leading_run(8192, probe).pages == 5000
    assert calls <= 28
