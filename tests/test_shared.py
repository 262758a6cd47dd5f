"""The shared tier on a folder: the contract, and two nodes that share nothing but the files."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.storage.tier import Tier
from tests.shared_folder import Node, files, nodes, open_tier
from tests.tier_contract import TierContract
from tests.tier_machine import tier_machine
from tests.tier_samples import get, held, put, sample


class TestContract(TierContract):
    def open(self, folder: Path) -> Tier:
        return open_tier(folder)


TestMachine = tier_machine(open_tier, examples=12, steps=25).TestCase


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(tmp_path / "shared") as start:
        yield start


class TestTwoNodes:
    def test_what_one_stores_and_removes_is_the_others_news(self, node: Node) -> None:
        one, two = node("a"), node("b")
        samples = [sample(n) for n in range(5)]
        put(one, *samples)
        assert two.news() == ([s.page.name for s in samples], [])
        assert get(two, *samples) == samples
        two.remove([samples[0].page.name])
        assert one.news() == ([], [samples[0].page.name])
        assert get(one, *samples) == [None, *samples[1:]]

    def test_what_came_and_left_between_two_calls_is_no_news(self, node: Node) -> None:
        one, two = node("a"), node("b")
        put(one, sample(1))
        one.remove([sample(1).page.name])
        assert two.news() == ([], [])

    def test_a_page_that_another_node_has_is_not_written_again(self, node: Node, tmp_path: Path) -> None:
        one, two = node("a"), node("b")
        put(one, sample(1))
        two.news()
        assert put(two, sample(1)) == [True]
        assert len(files(tmp_path)) == 1

    def test_unless_its_file_has_gone_in_the_meantime(self, node: Node, tmp_path: Path) -> None:
        one, two = node("a"), node("b")
        put(one, sample(1))
        two.news()
        files(tmp_path)[0].unlink()
        assert put(two, sample(1)) == [True]
        assert get(two, sample(1)) == [sample(1)]
        assert two.news() == ([], [])

    def test_of_a_page_stored_twice_one_copy_stays(self, node: Node, tmp_path: Path) -> None:
        one, two = node("a"), node("b")
        put(one, sample(1))
        put(two, sample(1))  # it has not heard of the other
        for tier in (one, two, one, two):
            tier.news()
        assert [path.parent.name for path in files(tmp_path)] == ["b"]
        for tier in (one, two):
            assert held(tier) == {sample(1).page.name}
            assert get(tier, sample(1)) == [sample(1)]

    def test_the_other_copy_stands_in(self, node: Node, tmp_path: Path) -> None:
        one, two = node("a", grace_s=99), node("b", grace_s=99)
        put(one, sample(1))
        put(two, sample(1))
        one.news()
        files(tmp_path)[1].unlink()
        assert get(one, sample(1)) == [sample(1)]
        assert one.news() == ([], [])

    def test_a_remove_reaches_a_copy_that_a_merge_has_moved(self, node: Node) -> None:
        """The merging node had not heard of the removal."""
        one, two = node("a"), node("b")
        for n in range(8):
            put(one, sample(n))
        two.news()
        one._housekeeping.step()
        assert one.counters["merged files"] == 8
        two.remove([sample(3).page.name])
        assert one.news().left == [sample(3).page.name]
        assert two.news() == ([], [])
        for tier in (one, two, node("c")):
            assert get(tier, sample(3), sample(4)) == [None, sample(4)]

    def test_two_daemons_of_one_name_do_no_harm(self, node: Node) -> None:
        one, twin = node("a"), node("a")
        samples = [sample(n) for n in range(24)]
        for n, what in enumerate(samples):
            put((one, twin)[n % 2], what)
            (one, twin)[n % 3 % 2].news()
        for tier in (one, twin):
            tier.news()
            assert get(tier, *samples) == samples
