"""A disk for tests that loses power: an XFS in a file, shut down without a last flush of its log. Takes root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import MIB, eventually


class XfsDisk:
    """Mounted at `mount_point`."""

    def __init__(self, folder: Path) -> None:
        self._image, self.mount_point = folder / "disk.img", folder / "mnt"
        self.mount_point.mkdir()
        with self._image.open("wb") as file:
            file.truncate(320 * MIB)
        run("mkfs.xfs", "-q", self._image)
        self._mount()

    def cut(self) -> None:
        """From now on nothing reaches the image, and every call fails."""
        run("xfs_io", "-x", "-c", "shutdown", self.mount_point)

    def power_up(self) -> None:
        """With what the image has. Nobody may use the disk any more."""
        self.close()
        self._mount()

    def close(self) -> None:
        """A mount namespace that was made meanwhile (a container) has a copy: until it ends, the disk has power."""
        run("umount", self.mount_point)
        eventually(lambda: not run("losetup", "-j", self._image), 180, "nobody else holds the disk")

    def _mount(self) -> None:
        run("mount", "-o", "loop", self._image, self.mount_point)


@contextmanager
def xfs_disk(folder: Path) -> Iterator[XfsDisk]:
    """Skips the test where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    try:
        disk = XfsDisk(folder)
    except FileNotFoundError:
        pytest.skip("xfsprogs is not installed")
    except OSError as why:
        pytest.skip(f"no XFS can be mounted here: {why}")
    try:
        yield disk
    finally:
        disk.close()


def run(*command: object) -> str:
    """What it says. Raises OSError where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{command[0]} failed")
    return done.stdout
