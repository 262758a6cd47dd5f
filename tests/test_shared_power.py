"""Power loss under a shared tier in a folder: what was acknowledged is there afterwards, in whole files."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import eventually
from tests.shared_lives import NodeProcess, check
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_acknowledged_pages_survive_power_loss_for_a_long_time(disk: XfsDisk) -> None:
    lose_power(disk, 60)
