"""A disk that is slowed down by the kernel: the block layer's own throttle, cgroup v1 `blkio`. Needs root.

It counts what the processes of one control group read from one device, below the file system and beside the page
cache, in slices of 100 ms: what is read after a pause gets through in a burst of one slice. Where this cannot be had,
`tests.slow_disk` slows the tier's own calls.
"""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

CONTROLLER = Path("/sys/fs/cgroup/blkio")


def available() -> bool:
    return os.access(CONTROLLER / "blkio.throttle.read_bps_device", os.W_OK)


class KernelThrottle:
    """Of the disk under `folder`, for the processes that it is told of and their children. `close` ends it."""

    how = "the kernel"
    environment: Mapping[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self._disk = _disk_under(folder)
        self._group = CONTROLLER / f"kvd-bench-{os.getpid()}"
        self._group.mkdir()

    def set(self, bytes_per_s: float) -> None:
        """From the next read on. 0: as fast as it is."""
        (self._group / "blkio.throttle.read_bps_device").write_text(f"{self._disk} {bytes_per_s:.0f}")

    def adopt(self, process: int) -> None:
        """Slow it down, and what it starts from now on."""
        (self._group / "cgroup.procs").write_text(str(process))

    def close(self) -> None:
        for _ in range(100):  # a killed process leaves its group a moment later
            with suppress(OSError):
                self._group.rmdir()
                return
            time.sleep(0.05)


def _disk_under(folder: Path) -> str:
    """major:minor of the whole disk: limits are not for partitions."""
    number = folder.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if (place / "partition").exists():
        place = place.resolve().parent
    return (place / "dev").read_text().strip()
