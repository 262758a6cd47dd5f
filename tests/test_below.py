"""The process of a lower tier as the daemon sees it: how long it may be silent. Time is a number here."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvd.daemon.below import OPENING_AFTER_S, SILENT_AFTER_S, Below
from kvd.settings import NvmeSettings
from tests.harness import MIB


class Tier:
    """A tier whose process has just been started."""

    def __init__(self, folder: Path, arena: int) -> None:
        settings = NvmeSettings(path=folder, size_bytes=32 * MIB, segment_bytes=32 * MIB)
        self.works = asyncio.Event()
        self.below = Below(
            "nvme", {**settings.model_dump(mode="json"), "shares": {}}, arena, lambda *_: None, lambda: None,
            self.works.set, lambda *_: None, 10.0,
        )  # fmt: skip
        self.later(0)

    def later(self, seconds: float) -> None:
        self.below.tick(time.monotonic() + seconds)

    @property
    def pid(self) -> int:
        assert self.below._process is not None
        return self.below._process.pid

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Callable[[Tier], Awaitable[None]]], None]:
    async def run(scene: Callable[[Tier], Awaitable[None]], arena: int) -> None:
        tier = Tier(tmp_path / "tier", arena)
        try:
            await scene(tier)
        finally:
            tier.below.close()

    def played(scene: Callable[[Tier], Awaitable[None]]) -> None:
        arena = os.memfd_create("arena")
        os.ftruncate(arena, MIB)
        try:
            asyncio.run(run(scene, arena))
        finally:
            os.close(arena)

    return played


Play = Callable[[Callable[[Tier], Awaitable[None]]], None]


def test_a_tier_that_takes_long_to_open_is_left_to_it_and_says_so(play: Play) -> None:
    async def opens_slowly(tier: Tier) -> None:
        assert tier.below.trouble == "opening"
        tier.stop()
        first = tier.pid
        tier.later(3 * SILENT_AFTER_S)
        assert tier.below.trouble == "opening for 30 s: a large catalog, or a disk that hangs"
        assert not tier.below.ready
        os.kill(first, signal.SIGCONT)
        await asyncio.wait_for(tier.works.wait(), 20)
        assert (tier.below.ready, tier.below.restarts, tier.pid) == (True, 0, first)

    play(opens_slowly)


def test_a_tier_that_does_not_open_at_all_is_started_again(play: Play) -> None:
    async def hangs(tier: Tier) -> None:
        tier.stop()
        tier.later(OPENING_AFTER_S + 1)
        assert tier.below.restarts == 1
        assert "does its disk hang" in tier.below.trouble

    play(hangs)


def test_a_tier_that_works_may_be_silent_for_seconds_only(play: Play) -> None:
    async def falls_silent(tier: Tier) -> None:
        await asyncio.wait_for(tier.works.wait(), 20)
        tier.stop()
        tier.later(SILENT_AFTER_S + 1)
        assert (tier.below.restarts, tier.below.ready) == (1, False)
        assert "does its disk hang" in tier.below.trouble

    play(falls_silent)
