"""A block device for tests that fails, hangs or is slow: an ext4 in a file, behind a loop device. Takes root.

cut        beyond some byte the kernel answers reads and writes with EIO
throttle   so many bytes per second for this process and its children; what is on its way meanwhile waits in the
           kernel, where not even SIGKILL reaches it (cgroup v1, blkio)
"""

import fcntl
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import MIB, eventually

LOOP_SET_STATUS64, LOOP_GET_STATUS64 = 0x4C04, 0x4C05
SIZE_LIMIT = struct.Struct("<32xQ")  # where struct loop_info64 has lo_sizelimit; 0: none
LOOP_INFO_BYTES = 232
BLKIO = Path("/sys/fs/cgroup/blkio")
HANGS = 1  # bytes per second: a page takes an hour


def run(*command: object) -> str:
    """What it prints. Raises OSError where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{command[0]} failed")
    return done.stdout.strip()


class Device:
    """Formatted and mounted at `mount_point`."""

    def __init__(self, folder: Path) -> None:
        self.mount_point = folder / "mnt"
        self.mount_point.mkdir()
        image = folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(384 * MIB)
        self.path = run("losetup", "--find", "--show", image)
        try:
            self.format()
            self.mount()
        except OSError:
            run("losetup", "--detach", self.path)
            raise

    def format(self) -> None:
        run("mkfs.ext4", "-q", "-F", "-m", 0, self.path)  # nothing is kept back for root

    def mount(self) -> None:
        run("mount", self.path, self.mount_point)

    def unmount(self) -> bool:
        """False: somebody is at it."""
        try:
            run("umount", self.mount_point)
        except OSError as why:
            return "not mounted" in str(why)
        return True

    def cut(self, size_bytes: int) -> None:
        """Beyond `size_bytes` everything fails from now on; 0: nothing does."""
        with open(self.path, "rb") as device:
            info = bytearray(LOOP_INFO_BYTES)
            fcntl.ioctl(device, LOOP_GET_STATUS64, info)
            info[: SIZE_LIMIT.size] = info[:32] + size_bytes.to_bytes(8, "little")
            fcntl.ioctl(device, LOOP_SET_STATUS64, bytes(info))

    def forget_cached(self, path: Path) -> None:
        """What the kernel keeps of a file in memory, as far as nobody maps it, and of that file alone."""
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self.cut(0)
        eventually(self.unmount, 20, "the device is unmounted")
        run("losetup", "--detach", self.path)


class Throttle:
    """A limit on what this process and the children that it starts read from and write to a device."""

    def __init__(self, device: Device) -> None:
        self._number = Path("/sys/block", Path(device.path).name, "dev").read_text().strip()
        found = re.search(r"^\d+:blkio:/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        if not found or not BLKIO.is_dir():
            raise OSError("no blkio controller (cgroup v1)")
        self._outside = BLKIO / found[1]
        self._inside = self._outside / f"kvd-test-{os.getpid()}"
        self._inside.mkdir()
        self._enter(self._inside)

    def set(self, bytes_per_s: int) -> None:
        """From now on, also for what waits already; 0: no limit."""
        for what in ("read", "write"):
            (self._inside / f"blkio.throttle.{what}_bps_device").write_text(f"{self._number} {bytes_per_s}")

    def close(self) -> None:
        self.set(0)
        self._enter(self._outside)
        eventually(self._gone, 20, "no process is left in the cgroup")

    def _enter(self, group: Path) -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    def _gone(self) -> bool:
        try:
            self._inside.rmdir()
        except OSError:
            return False
        return True


@contextmanager
def loop_device(folder: Path) -> Iterator[Device]:
    """Skips the test where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("loop devices and mounting take root")
    if missing := [tool for tool in ("losetup", "mkfs.ext4", "mount") if not shutil.which(tool)]:
        pytest.skip(f"not installed: {missing}")
    try:
        device = Device(folder)
    except OSError as why:
        pytest.skip(f"no ext4 on a loop device here: {why}")
    try:
        yield device
    finally:
        device.close()


@contextmanager
def throttle(device: Device) -> Iterator[Throttle]:
    """Skips the test where there can be none. Leave it after all who use the device have ended, before the device."""
    try:
        throttle = Throttle(device)
    except OSError as why:
        pytest.skip(f"no device can be throttled here: {why}")
    try:
        yield throttle
    finally:
        throttle.close()
