"""Power loss under a shared tier in a folder: what was acknowledged is there afterwards, in whole files."""

import random
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness import eventually
from tests.shared_lives import NodeProcess, check
from tests.shared_process import PAGES, open_node, page
from tests.tier_samples import get, put
from tests.xfs_disk import XfsDisk, xfs_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[XfsDisk]:
    with xfs_disk(tmp_path) as disk:
        yield disk


def lose_power(disk: XfsDisk, rounds: int) -> None:
    """Two nodes store, merge and delete; the file system goes at any moment, and is mounted again."""
    folder, rng, lives = disk.mount_point / "shared", random.Random(rounds), list[NodeProcess]()
    for round_ in range(rounds):
        running = [NodeProcess(str(folder), name, f"{name}{round_}") for name in "ab"]
        lives += running
        eventually(lambda nodes=running: all(node.said("put") for node in nodes), 60, "both have stored something")
        time.sleep(rng.random())  # at any time
        disk.cut()
        for life in running:
            life.kill()
            life.end()
        disk.power_up()
        check(str(folder), lives, (path.read_bytes() for path in folder.glob("*/*.pages.arrow")))


def test_acknowledged_pages_survive_power_loss(disk: XfsDisk) -> None:
    lose_power(disk, 3)


def test_what_another_node_has_not_synced_yet_is_not_taken_for_durable(disk: XfsDisk) -> None:
    """A file is seen as soon as it has its name; whoever counts on it makes sure that the name stays."""
    folder = disk.mount_point / "shared"
    slow = NodeProcess(str(folder), "slow", 1, failpoint="folder.renamed:1:hang")
    try:
        eventually(lambda: list(folder.glob("slow/*.pages.arrow")), 60, "it has named its first file")
        tier = open_node(str(folder), "quick")
        known = [number for number in range(PAGES) if tier.find([page(number).page.name])[0]]
        assert known, "the file is seen"
        assert put(tier, *map(page, known)) == [True] * len(known)
        assert not list(folder.glob("quick/*")), "for it is there already"
        tier.close()
        disk.cut()
    finally:
        slow.kill()
        slow.end()
    disk.power_up()
    with closing(open_node(str(folder), "late")) as tier:
        assert get(tier, *map(page, known)) == [page(number) for number in known]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_acknowledged_pages_survive_power_loss_for_a_long_time(disk: XfsDisk) -> None:
    lose_power(disk, 60)
