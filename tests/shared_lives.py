"""Lives of nodes of a shared tier: started, killed, listened to; and what must hold when they are over."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from kvd.storage.failpoints import VARIABLE
from tests.harness import eventually
from tests.shared_process import PAGES, open_node, page
from tests.tier_samples import get, held

ROOT = Path(__file__).parents[1]
FOR_EVER = 1_000_000


class NodeProcess:
    """One life of a node, and what it said."""

    def __init__(
        self, uri: str, node: str, seed: object, turns: int = FOR_EVER, failpoint: str = "", grace_s: float = 0.05,
        poll_s: float = 0.0,
    ) -> None:  # fmt: skip
        arguments = [uri, node, *map(str, (seed, turns, grace_s, poll_s))]
        environment = {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.shared_process", *arguments],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            env={**environment, "PATH": "", VARIABLE: failpoint},
        )
        self.lines: list[list[str]] = []
        self._reader = threading.Thread(target=self._listen)
        self._reader.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.lines.append(line.split())
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> int:
        code = self.process.wait(120)
        self._reader.join()
        return code

    def said(self, word: str) -> set[int]:
        return {int(number) for what, *numbers in list(self.lines) if what == word for number in numbers}


def said(lives: Iterable[NodeProcess], word: str) -> set[int]:
    return set[int]().union(*(life.said(word) for life in lives))


def killed_at_random(uri: str, nodes: int, kills: int, seed: int) -> list[NodeProcess]:
    """So many nodes at once, each time one of them killed at any moment and started again; all are dead at the end."""
    rng = random.Random(seed)
    running = {f"n{number}": NodeProcess(uri, f"n{number}", number) for number in range(nodes)}
    lives = list(running.values())
    try:
        for _ in range(kills):
            name = rng.choice(list(running))
            eventually(lambda life=running[name]: life.said("put"), 60, "it has stored something")
            time.sleep(rng.random() * 0.3)  # at any time
            running[name].kill()
            running[name] = NodeProcess(uri, name, rng.random())
            lives.append(running[name])
    finally:
        for life in lives:
            life.kill()
            life.end()
    return lives


def check(uri: str, lives: Sequence[NodeProcess], files: Iterable[bytes]) -> None:
    """Nobody read anything wrong, and what was acknowledged is there: for a node that comes late, whole.

    And for anybody with pyarrow: `files` are all page files that lie there.
    """
    acknowledged = said(lives, "put")
    assert acknowledged
    assert not said(lives, "wrong")
    tier = open_node(uri, "late")
    try:
        found = get(tier, *map(page, range(PAGES)))
        for number, got in enumerate(found):
            assert got in (None, page(number)), f"page {number} is wrong"
        assert {number for number, got in enumerate(found) if got} >= acknowledged
        assert len(held(tier)) == sum(got is not None for got in found), "what is listed is there"
        assert not {"truncated", "damaged", "foreign"} & set(tier.counters), "files are whole"
    finally:
        tier.close()
    for data in files:
        pa.ipc.open_file(data).read_all().validate(full=True)
