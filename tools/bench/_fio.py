"""fio on a file of its own: the disk's own figure, O_DIRECT, libaio, by block size and queue depth."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench._peers import Missing


class Result(NamedTuple):
    """Of one job."""

    bytes_per_s: float
    cpu_s: float


class Fio:
    """Writes to a file of its own, which is written once before the first job; reads of any files."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        """Raises Missing where fio or O_DIRECT is."""
        program = shutil.which("fio")
        if program is None:
            raise Missing("fio is not installed (Debian: fio)")
        self._program, self._file, self._size, self._at = program, folder / "fio.bin", size_bytes, 0
        self.write(1 << 20, 8, size_bytes, size_bytes)

    def write(self, block_bytes: int, depth: int, total_bytes: int, sync_bytes: int) -> Result:
        """In order, from where the last job ended, round and round; fdatasync after every `sync_bytes`."""
        if self._at + total_bytes > self._size:
            self._at = 0
        job = [f"--filename={self._file}", f"--offset={self._at}", f"--size={total_bytes}"]
        self._at += total_bytes
        job += [f"--fdatasync={sync_bytes // block_bytes}", "--end_fsync=1"]
        return self._run("write", block_bytes, depth, job)

    def read(self, block_bytes: int, depth: int, total_bytes: int, files: Sequence[Path], offset: int) -> Result:
        """Random blocks of files of one size, from `offset` on in each."""
        size = (files[0].stat().st_size - offset) // block_bytes * block_bytes
        job = [f"--filename={':'.join(map(str, files))}", f"--offset={offset}", f"--filesize={size}"]
        job += [f"--size={size * len(files)}", f"--io_size={total_bytes}", "--file_service_type=random", "--readonly"]
        return self._run("randread", block_bytes, depth, job)

    def _run(self, what: str, block_bytes: int, depth: int, job: list[str]) -> Result:
        command = [
            self._program, "--name=kvd", f"--rw={what}", f"--bs={block_bytes}",
            f"--iodepth={depth}", "--direct=1", "--ioengine=libaio", "--output-format=json", "--norandommap",
            "--randrepeat=0", *job,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        except (ValueError, LookupError):
            raise Missing(f"fio failed: {(done.stderr or done.stdout).strip()[-200:]}") from None
        if found["error"]:
            raise Missing(f"fio failed: error {found['error']}")
        side = found["write" if "write" in what else "read"]
        cpu = (found["usr_cpu"] + found["sys_cpu"]) / 100 * found["job_runtime"] / 1000
        return Result(float(side["bw_bytes"]), cpu)
