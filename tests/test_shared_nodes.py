"""Nodes of a shared tier as processes that are killed: whole files only, nothing wrong, nothing acknowledged lost."""

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from kvd.storage.failpoints import VARIABLE
from tests.shared_process import PAGES, open_node, page
from tests.tier_samples import get, held

ROOT = Path(__file__).parents[1]
# The ninth write is a merge's.
STEPS = (("write", 1), ("write", 9), ("sync", 9), ("rename", 9), ("renamed", 9), ("delete", 1), ("delete", 3))


class NodeProcess:
    """One life of a node, and what it said."""

    def __init__(self, folder: Path, node: str, seed: object, turns: int = 1_000_000, failpoint: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.shared_process", str(folder), node, str(seed), str(turns)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            env={"PATH": "", VARIABLE: failpoint},
        )
        self.lines: list[list[str]] = []
        self._reader = threading.Thread(target=self._listen)
        self._reader.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.lines += (line.split() for line in self.process.stdout if line.endswith("\n"))
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> int:
        code = self.process.wait(60)
        self._reader.join()
        return code

    @property
    def acknowledged(self) -> set[int]:
        return {int(number) for what, *numbers in self.lines if what == "put" for number in numbers}

    @property
    def wrong(self) -> list[list[str]]:
        return [line for line in self.lines if line[0] == "wrong"]


def check(folder: Path, acknowledged: set[int]) -> None:
    """As a node that comes later sees it, and as anybody with pyarrow does."""
    tier = open_node(str(folder), "late")
    try:
        found = get(tier, *map(page, range(PAGES)))
        for number, got in enumerate(found):
            assert got in (None, page(number)), f"page {number} is wrong"
        assert {number for number, got in enumerate(found) if got} >= acknowledged
        assert len(held(tier)) == sum(got is not None for got in found), "what is listed is there"
        assert not {"truncated", "damaged", "foreign"} & set(tier.counters), "files are whole"
    finally:
        tier.close()
    for path in folder.glob("*/*.pages.arrow"):
        pa.ipc.open_file(path.read_bytes()).read_all().validate(full=True)


@pytest.mark.parametrize("nodes", [2, 4])
def test_nodes_killed_at_any_time_lose_nothing_acknowledged(tmp_path: Path, nodes: int) -> None:
    rng = random.Random(nodes)
    lives: list[NodeProcess] = []
    running = {f"n{number}": NodeProcess(tmp_path, f"n{number}", number) for number in range(nodes)}
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        name = rng.choice(list(running))
        while not running[name].acknowledged and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)  # at any time
        lives.append(running[name])
        running[name].kill()
        running[name] = NodeProcess(tmp_path, name, rng.random())
    lives += running.values()
    for life in lives:
        life.kill()
        life.end()
    assert not [life.wrong for life in lives if life.wrong]
    acknowledged = set[int]().union(*(life.acknowledged for life in lives))
    assert len(acknowledged) > 50
    check(tmp_path, acknowledged)


@pytest.mark.parametrize(("step", "nth"), STEPS)
def test_a_node_killed_at_a_step_leaves_whole_files_only(tmp_path: Path, step: str, nth: int) -> None:
    life = NodeProcess(tmp_path, "a", 1, turns=60, failpoint=f"folder.{step}:{nth}:kill")
    assert life.end() == -9, "the step was reached"
    assert not life.wrong
    check(tmp_path, life.acknowledged)
    again = NodeProcess(tmp_path, "a", 2, turns=20)
    assert again.end() == 0
    assert not again.wrong
    check(tmp_path, life.acknowledged | again.acknowledged)
