"""Nodes of a shared tier on one folder, for tests: opened, looked into from outside, their bookkeeping checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvd.storage import failpoints
from kvd.storage.shared import SharedTier
from kvd.storage.tier import News

MIB = 1 << 20
Node = Callable[..., SharedTier]


class PollingTier(SharedTier):
    """Polls, where that is due, before it tells its news."""

    def news(self) -> News:
        self.tend()
        return super().news()


def open_tier(folder: Path, node: str = "a", **settings: Any) -> SharedTier:
    """A tier that polls at every call of `news` and waits for nobody."""
    return PollingTier(
        str(folder), node, **({"quota_bytes": 24 * MIB, "file_bytes": 4 * MIB, "poll_s": 0, "grace_s": 0} | settings)
    )


@contextmanager
def nodes(folder: Path) -> Iterator[Node]:
    """Opens nodes on one folder. At the end each one's bookkeeping is checked, and no failpoint is armed."""
    opened: list[SharedTier] = []

    def start(name: str, **settings: Any) -> SharedTier:
        opened.append(open_tier(folder, name, **settings))
        return opened[-1]

    yield start
    failpoints.arm("")
    for tier in opened:
        assert not tier.check()
        tier.close()


def files(tmp_path: Path, kind: str = "pages") -> list[Path]:
    return sorted((tmp_path / "shared").glob(f"*/*.{kind}.arrow"))
