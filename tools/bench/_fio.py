"""fio on a file of its own: the disk's own figure, O_DIRECT, libaio, by block size and queue depth."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench._peers import Missing


class Result(NamedTuple):
    """Of one job."""

    bytes_per_s: float
    cpu_s: float


class Fio:
    """Jobs on one file, which is written once before the first."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        """Raises Missing where fio or O_DIRECT is."""
        program = shutil.which("fio")
        if program is None:
            raise Missing("fio is not installed (Debian: fio)")
        self._program, self._file, self._size = program, folder / "fio.bin", size_bytes
        self.run("write", 1 << 20, 8, size_bytes)

    def run(self, what: str, block_bytes: int, depth: int, total_bytes: int) -> Result:
        """`what`: write (in order, then fsync) or randread."""
        command = [
            self._program, "--name=kvd", f"--filename={self._file}", f"--rw={what}", f"--bs={block_bytes}",
            f"--size={self._size // block_bytes * block_bytes}", f"--io_size={total_bytes}", f"--iodepth={depth}",
            "--direct=1", "--ioengine=libaio", "--end_fsync=1", "--output-format=json", "--norandommap",
            "--randrepeat=0",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        except (ValueError, LookupError):
            raise Missing(f"fio failed: {(done.stderr or done.stdout).strip()[-200:]}") from None
        if job["error"]:
            raise Missing(f"fio failed: error {job['error']}")
        side = job["write" if "write" in what else "read"]
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        return Result(float(side["bw_bytes"]), cpu)
