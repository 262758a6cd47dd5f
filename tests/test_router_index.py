"""The router's index: what it says of holders is what they said, whatever order that came in; and it is bounded."""

import tracemalloc
from array import array
from collections import deque
from random import Random

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.router.index import Index

CHAIN = [hash(("chain", n)) for n in range(1000)]
OTHER = [hash(("other", n)) for n in range(1000)]


def swept(index: Index) -> Index:
    while index.sweep(100):
        pass
    assert index.faults() == []
    return index


def test_holders_are_credited_with_what_they_have_from_the_first_block_on() -> None:
    index = Index(10_000)
    index.store(1, None, CHAIN[:100])
    index.store(2, None, CHAIN[:40])
    index.store(2, CHAIN[9], OTHER[:5])
    assert index.match(CHAIN) == {1: 100, 2: 40}
    assert index.match(CHAIN[:30]) == {1: 30, 2: 30}
    assert index.match([*CHAIN[:10], *OTHER]) == {1: 10, 2: 15}
    assert index.match([*CHAIN[:70], *OTHER]) == {1: 70, 2: 40}
    assert index.match([0, *OTHER]) == {}
    assert index.match([]) == {}
    assert (index.held(1), index.held(2)) == (100, 45)
    swept(index)


def test_what_lies_behind_a_hole_counts_for_nothing_until_it_is_filled() -> None:
    index = Index(10_000)
    index.store(1, None, CHAIN[:100])
    index.remove(1, CHAIN[30:40])
    assert index.match(CHAIN) == {1: 30}
    index.store(1, CHAIN[29], CHAIN[30:40])
    assert index.match(CHAIN) == {1: 100}
    swept(index)


def test_children_that_come_before_their_parents_count_once_those_are_there() -> None:
    index = Index(10_000)
    assert index.store(1, CHAIN[59], CHAIN[60:80])
    assert index.store(1, CHAIN[19], CHAIN[20:60])
    assert index.match(CHAIN) == {}
    assert index.store(1, None, CHAIN[:20])
    assert index.match(CHAIN) == {1: 80}
    swept(index)


def test_a_chain_stored_and_evicted_in_pieces_by_many_stays_a_few_runs() -> None:
    index = Index(10_000)
    for holder in range(4):
        for at in range(0, 1000, 25):
            index.store(holder, CHAIN[at - 1] if at else None, CHAIN[at : at + 25])
        assert index.stats().runs <= 2, holder
    for holder in range(3):
        for at in range(1000, 200, -25):
            index.remove(holder, CHAIN[at - 25 : at])
            assert index.match(CHAIN)[holder] == at - 25
        assert index.stats().runs <= 2, holder
    assert index.match(CHAIN) == {0: 200, 1: 200, 2: 200, 3: 1000}
    swept(index)


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_what_nobody_has_is_forgotten(order: str) -> None:
    index = Index(10_000)
    index.store(1, None, CHAIN)
    index.store(1, CHAIN[99], OTHER)
    for hashes in (CHAIN, OTHER):
        index.remove(1, hashes if order == "forwards" else hashes[::-1])
    assert index.match(CHAIN) == {}
    assert swept(index).stats().blocks == 0
    assert index.held(1) == 0


def test_clearing_takes_effect_at_once_and_is_swept_up_by_what_is_stored_later() -> None:
    index = Index(10_000)
    for holder in (1, 2):
        index.store(holder, None, CHAIN)
        index.store(holder, None, OTHER)
    index.clear(1)
    assert index.match(CHAIN) == {2: 1000}
    index.store(1, None, CHAIN[:10])
    assert index.match(CHAIN) == {1: 10, 2: 1000}
    index.clear(2)
    assert index.match(CHAIN) == {1: 10}
    for n in range(100):
        index.store(1, None, [hash(("new", n))])
    assert index.stats().blocks == 110
    index.clear(1)
    assert index.match(CHAIN) == {}, "nobody is left, though the blocks are"
    swept(index)


def test_a_full_index_refuses_and_says_who_is_not_exact_until_cleared() -> None:
    index = Index(1001)
    assert index.store(1, None, CHAIN)
    assert index.store(2, None, CHAIN), "no new blocks"
    assert not index.store(2, None, OTHER[:2])
    assert not index.store(2, CHAIN[-1], OTHER[:1]), "though there would be room"
    assert (index.exact(1), index.exact(2), index.stats().inexact) == (True, False, 1)
    assert index.match(CHAIN) == {1: 1000, 2: 1000}, "what it had is true all the same"
    index.remove(2, CHAIN[500:])
    assert index.match(CHAIN) == {1: 1000, 2: 500}
    index.clear(2)
    assert index.store(2, None, CHAIN[:7])
    assert index.match(CHAIN) == {1: 1000, 2: 7}
    index.clear(1)
    index.clear(2)
    assert index.store(1, None, OTHER), "what was cleared gives room"
    swept(index)


def test_a_holder_that_says_it_has_more_than_it_can_is_not_believed() -> None:
    index = Index(10_000)
    index.limit(1, 100)
    assert index.store(1, None, CHAIN[:100])
    assert index.store(1, None, CHAIN[50:100][:0])
    assert index.store(1, CHAIN[49], CHAIN[50:100]), "it has those"
    assert not index.store(1, CHAIN[99], CHAIN[100:101])
    assert index.match(CHAIN) == {1: 100}
    swept(index)


def test_many_stretches_at_once_are_as_one_after_the_other() -> None:
    index = Index(100)
    index.limit(1, 40)
    assert index.store_all(1, [(None, array("q", CHAIN[:10])), (None, array("q")), (CHAIN[4], array("q", OTHER[:5])),
                               (None, array("q", CHAIN[:20]))])  # fmt: skip
    assert (index.match(CHAIN), index.held(1)) == ({1: 20}, 25)
    assert index.store_all(1, [(OTHER[4], array("q", OTHER[5:20])), (None, array("q", CHAIN[:20]))]), "they just fit"
    assert not index.store_all(1, [(OTHER[19], array("q", OTHER[20:21])), (None, array("q", CHAIN[:5]))])
    assert (index.held(1), index.exact(1)) == (40, False)
    assert not index.store_all(2, [(CHAIN[3], array("q", CHAIN[2:3])), (None, array("q", CHAIN[:5]))]), "contradicts"
    assert index.match(CHAIN) == {1: 20}
    assert not index.store_all(3, [(None, array("q", [n])) for n in range(100)]), "more than there is room for"
    assert index.store_all(4, [])
    swept(index)


def test_one_block_under_two_parents_is_a_contradiction() -> None:
    index = Index(10_000)
    assert index.store(1, None, CHAIN[:10])
    for parent, hashes in ((CHAIN[4], CHAIN[3:5]), (CHAIN[7], CHAIN[2:3]), (CHAIN[9], CHAIN[:2]),
                           (OTHER[0], CHAIN[4:6]), (None, [OTHER[1], OTHER[2], OTHER[1]])):  # fmt: skip
        assert not index.store(2, parent, hashes)
        index.clear(2)
        assert index.match(CHAIN) == {1: 10}
    assert index.store(3, OTHER[5], OTHER[6:8])
    assert not index.store(3, OTHER[7], OTHER[5:6]), "a block that comes before itself"
    index.clear(3)
    assert swept(index).stats().blocks == 10


@pytest.mark.parametrize("order", ["tier first", "worker first"])
@pytest.mark.parametrize("turn", [1, -1])
def test_who_does_not_know_parents_says_the_same_as_who_does(order: str, turn: int) -> None:
    """As kvd's tiers do of pages that came from a disk."""
    index = Index(10_000)
    if order == "worker first":
        assert index.store(1, None, CHAIN[:40])
    for block in CHAIN[:30][::turn]:
        assert index.store(2, None, [block])
    for at in range(0, 40, 10):
        assert index.store(1, CHAIN[at - 1] if at else None, CHAIN[at : at + 10])
    assert index.store(1, CHAIN[9], OTHER[:5])
    assert index.match(CHAIN) == {1: 40, 2: 30}
    assert index.match([*CHAIN[:10], *OTHER]) == {1: 15, 2: 10}
    index.remove(1, CHAIN[:40])
    index.remove(2, CHAIN[20:25])
    assert index.match(CHAIN) == {2: 20}
    index.clear(1)
    index.clear(2)
    assert swept(index).stats().blocks == 0


def test_what_follows_a_fork_counts_though_nobody_said_that_it_follows() -> None:
    index = Index(10_000)
    assert index.store(1, None, [*CHAIN[:5], *OTHER[:5]])
    for block in [*CHAIN[:10], *OTHER[:5]]:
        assert index.store(2, None, [block])
    assert index.match(CHAIN) == {1: 5, 2: 10}
    swept(index)


def test_no_run_counts_twice_for_a_chain_that_a_peer_has_mixed_up() -> None:
    index = Index(10_000)
    assert index.store(1, None, [1, 2, 3, 4])
    assert index.match([1, 8, 9, 4, 8, 2]) == {1: 4}, "hashes are chained: who names such parents has some of them"
    assert index.match([2, 3]) == index.match([4]) == {}
    assert index.match([1, 8, 9, 4, 5, 3, 2, 4]) == {1: 4}
    swept(index)


def test_a_match_ends_at_a_block_that_a_peer_put_behind_another() -> None:
    index = Index(10_000)
    assert index.store(1, None, [OTHER[0], *CHAIN[:3]])
    assert index.match(CHAIN) == {}
    assert index.store(2, None, CHAIN[:3])
    assert index.match(CHAIN).get(2) == 3, "which does no harm to those that begin there"
    swept(index)


def test_a_block_takes_at_most_120_bytes_however_many_have_it() -> None:
    blocks = 48_000  # its tables have just grown: the worst moment
    tracemalloc.start()
    try:
        index = Index(10 * blocks)
        for at in range(0, blocks, 32):
            hashes = [hash((at, n)) for n in range(32)]
            for holder in range(at % 64, 512, 64):
                index.store(holder, None, hashes)
        del hashes
        assert tracemalloc.get_traced_memory()[0] <= 120 * index.stats().blocks
    finally:
        tracemalloc.stop()


def test_memory_comes_back_and_bits_are_used_again_when_holders_come_and_go() -> None:
    index = Index(5_000)
    for n in range(2_000):
        index.store(n, None, [hash((n, number)) for number in range(10)])
        index.store(n, None, CHAIN[:50])
        if n >= 3:
            index.clear(n - 3)
        assert index.match(CHAIN) == dict.fromkeys(range(max(0, n - 2), n + 1), 50)
    assert index._holders.live.bit_length() < 300
    assert swept(index).stats().blocks == 80
    assert index.stats().holders == 3


@pytest.mark.slow
def test_memory_is_flat_while_ten_million_blocks_come_and_go() -> None:
    random, process = Random(1), psutil.Process()
    index = Index(400_000)
    chains: deque[tuple[list[int], list[int]]] = deque()  # and who has it
    stored = settled = most = 0
    while stored < 10_000_000:
        chain = [random.getrandbits(64) - (1 << 63) for _ in range(random.choice((1, 7, 32, 512)))]
        holders = random.sample(range(64), random.choice((1, 1, 2)))
        for holder in holders:
            for at in range(0, len(chain), 32):
                assert index.store(holder, chain[at - 1] if at else None, chain[at : at + 32])
        chains.append((chain, holders))
        stored += len(chain)
        while index.stats().blocks > 100_000:
            chain, holders = chains.popleft()
            for holder in holders:
                for at in range(len(chain), 0, -48):
                    index.remove(holder, chain[max(0, at - 48) : at])
        if random.random() < 0.001:
            gone = random.randrange(64)
            index.clear(gone)
            chains = deque((chain, [one for one in holders if one != gone]) for chain, holders in chains)
        if stored >= 1_000_000:
            most = max(most, process.memory_info().rss)
            settled = settled or most
    assert most - settled < 4_000_000, "10^6 blocks had come and gone before, and 10^5 take some 10 MB"
    swept(index)


@pytest.mark.parametrize("hashes", [[1 << 63], [1, 2, -(1 << 63) - 1], [1.5], ["a"], [None]])
def test_what_is_no_hash_changes_nothing(hashes: list[int]) -> None:
    index = Index(100)
    with pytest.raises((OverflowError, TypeError)):
        index.store(1, None, hashes)
    with pytest.raises((OverflowError, TypeError)):
        index.store(1, 1 << 63, [1])
    with pytest.raises((OverflowError, TypeError)):
        index.remove(1, hashes)
    assert swept(index).stats().blocks == 0


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_every_hash_is_itself(block: int) -> None:
    index = Index(10)
    index.store(1, None, [block])
    assert index.match([block]) == {1: 1}
    assert index.match([block ^ 1]) == index.match([block ^ (1 << 62)]) == {}
