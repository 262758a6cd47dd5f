"""The router's index against sets: any stores and removals, in any order, of holders that do not know parents, and of
holders that lie."""

from array import array
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvd.router.index import Index
from tests.index_model import leading

# Chains for the machine: a tree of blocks, each path from its top a chain. Branches at 3, 5, 6 and 11.
TREE: dict[int, int | None] = {}
for first, length, below in (
    (100, 20, None),
    (200, 9, 102),
    (300, 9, 105),
    (400, 6, 305),
    (500, 5, None),
    (600, 4, 111),
):
    for number in range(length):
        TREE[first + number] = first + number - 1 if number else below


def path(block: int) -> list[int]:
    """From the top to this block."""
    above = TREE[block]
    return [block] if above is None else [*path(above), block]


BLOCKS = st.sampled_from(sorted(TREE))
TIPS = [block for block in TREE if block not in TREE.values()]
HOLDERS = st.integers(0, 3)


class Machine(RuleBasedStateMachine):
    """The index against sets. Hashes are chained; what comes when is anybody's guess."""

    max_blocks = 1000
    liars = 0  # so many of the holders name any parent for any block

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(self.max_blocks)
        self.truth: dict[int, set[int]] = {holder: set() for holder in range(4)}
        self.exact = dict.fromkeys(range(4), True)
        self.orphans: set[int] = set()  # who named no parent of a block that may have one

    @rule(holder=HOLDERS, tip=BLOCKS, skip=st.integers(0, 12))
    def store(self, holder: int, tip: int, skip: int) -> None:
        self._store(holder, *self._stretch(tip, skip))

    @rule(holder=HOLDERS, tip=st.sampled_from(TIPS))
    def store_whole(self, holder: int, tip: int) -> None:
        self._store(holder, None, path(tip))

    @rule(holder=HOLDERS, said=st.lists(st.tuples(BLOCKS, st.integers(0, 12)), max_size=4))
    def store_all(self, holder: int, said: list[tuple[int, int]]) -> None:
        stretches = [self._stretch(tip, skip) for tip, skip in said]
        exact = self.index.store_all(holder, [(parent, array("q", blocks)) for parent, blocks in stretches])
        self._stored(holder, exact, (block for _, blocks in stretches for block in blocks))

    @rule(holder=HOLDERS, blocks=st.lists(BLOCKS, max_size=8), together=st.booleans())
    def store_without_parents(self, holder: int, blocks: list[int], together: bool) -> None:
        """As kvd's tiers tell of pages that they found on a disk."""
        if blocks:
            self.orphans.add(holder)
        if together:
            exact = self.index.store_all(holder, [(None, array("q", [block])) for block in blocks])
            self._stored(holder, exact, blocks)
            return
        for block in blocks:
            self._store(holder, None, [block])

    @rule(holder=HOLDERS, tip=BLOCKS, skip=st.integers(1, 12))
    def store_the_rest_without_its_parent(self, holder: int, tip: int, skip: int) -> None:
        self.orphans.add(holder)
        self._store(holder, None, self._stretch(tip, skip)[1])

    @rule(holder=HOLDERS, tip=BLOCKS, skip=st.integers(0, 12), backwards=st.booleans())
    def remove(self, holder: int, tip: int, skip: int, backwards: bool) -> None:
        _, blocks = self._stretch(tip, skip)
        self.index.remove(holder, blocks[::-1] if backwards else blocks)
        self.truth[holder] -= set(blocks)

    @rule(holder=HOLDERS, blocks=st.lists(BLOCKS, max_size=5))
    def remove_any(self, holder: int, blocks: list[int]) -> None:
        self.index.remove(holder, blocks)
        self.truth[holder] -= set(blocks)

    @rule(holder=HOLDERS)
    def clear(self, holder: int) -> None:
        self.index.clear(holder)
        self.truth[holder] = set()
        self.exact[holder] = True
        self.orphans.discard(holder)

    @rule(steps=st.integers(1, 30))
    def sweep(self, steps: int) -> None:
        self.index.sweep(steps)

    @precondition(lambda self: self.liars)
    @rule(holder=st.integers(0, 1), parent=st.none() | BLOCKS, blocks=st.lists(BLOCKS, min_size=1, max_size=6))
    def contradict(self, holder: int, parent: int | None, blocks: list[int]) -> None:
        self._store(holder, parent, blocks)

    @invariant()
    def says_the_truth(self) -> None:
        assert self.index.faults() == []
        for tip in TIPS:
            chain = path(tip)
            for asked in (chain, chain[: len(chain) // 2], [*chain, 999]):
                found = self.index.match(asked)
                for holder, held in self.truth.items():
                    if holder < self.liars or (self.liars and holder in self.orphans):
                        assert found.get(holder, 0) <= len(held), "credited with more blocks than it says it has"
                    elif self.exact[holder] and not self.liars:
                        assert found.get(holder, 0) == leading(held, asked)
                    else:
                        assert found.get(holder, 0) <= leading(held, asked)
                assert 0 not in found.values()

    def teardown(self) -> None:
        for holder in self.truth:
            self.index.clear(holder)
        while self.index.sweep(10):
            pass
        assert self.index.faults() == []
        assert self.index.stats().blocks == 0

    def _stretch(self, tip: int, skip: int) -> tuple[int | None, list[int]]:
        blocks = path(tip)
        first = min(skip, len(blocks) - 1)
        return blocks[first - 1] if first else None, blocks[first:]

    def _store(self, holder: int, parent: int | None, blocks: list[int]) -> None:
        self._stored(holder, self.index.store(holder, parent, blocks), blocks)

    def _stored(self, holder: int, exact: bool, blocks: Iterable[int]) -> None:
        self.exact[holder] = exact
        self.truth[holder].update(blocks)  # refused or not: it is what the holder has
        if not self.liars and self.max_blocks == 1000:
            assert self.exact[holder]


class Crowded(Machine):
    max_blocks = 24


class Hostile(Machine):
    """Liars get nothing for the others: a holder that names its parents, and the right ones, never gets more than it
    has."""

    liars = 2


USUAL = settings(max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
MACHINES = (Machine, Crowded, Hostile)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_index_says_what_sets_say(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=USUAL)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_the_index_says_what_sets_say_at_length(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=settings(USUAL, max_examples=600))
