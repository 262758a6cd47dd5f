"""In which order pages of a file are stored: each once, and after its parent."""

from hypothesis import given
from hypothesis import strategies as st

from kvd.ctl.moving.order import runs
from kvd.storage.tier import Page


@given(st.lists(st.integers(-1, 30), max_size=30))
def test_every_page_comes_once_and_after_its_parent(parents: list[int]) -> None:
    """Page n's parent is parents[n], which may not be there, or make a ring."""

    def key(number: int) -> bytes:
        return (number + 1).to_bytes(32, "big")

    pages = [Page(bytes(16), key(n), key(parent), 1, (bytes(16),)) for n, parent in enumerate(parents)]
    found = list(runs(pages))
    order = [position for run in found for position in run]
    assert sorted(order) == list(range(len(pages)))
    for run in found:
        assert [pages[position].parent for position in run[1:]] == [pages[position].key for position in run[:-1]]
    rank = {position: when for when, position in enumerate(order)}
    for position, parent in enumerate(parents):
        if 0 <= parent < len(pages) and not _in_a_ring(parents, position):
            assert rank[parent] < rank[position]


def _in_a_ring(parents: list[int], position: int) -> bool:
    seen: set[int] = set()
    while 0 <= position < len(parents) and position not in seen:
        seen.add(position)
        position = parents[position]
    return position in seen


def test_a_long_chain_is_one_run() -> None:
    pages = [Page(bytes(16), bytes([n + 1]) * 32, bytes([n]) * 32, 1, (bytes(16),)) for n in range(200)]
    assert list(runs(pages[::-1])) == [list(range(199, -1, -1))]
