"""A disk of a chosen speed under kvd's NVMe tier, for tests and benchmarks; needs a C compiler, and no root.

`tests/slow_disk.c`, preloaded into kvd's processes, paces what they read from segment files. The speed may be changed
at any time. Nothing of it is in kvd: the tier asks the real disk through the real calls, and waits longer.
"""

import shutil
import struct
import subprocess
from pathlib import Path

COMPILER = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
MISSING = "" if COMPILER else "no C compiler"
_SOURCE = Path(__file__).with_suffix(".c")
_CONTROL = struct.Struct("dd")


class SlowDisk:
    """`environment` goes to the process to slow down. As fast as the real disk until `set`."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER, MISSING
        library, self._control = folder / "slow_disk.so", folder / "slow_disk.speed"
        subprocess.run(
            [COMPILER, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"], check=True
        )
        self.set(0)
        self.environment = {"LD_PRELOAD": str(library), "SLOW_DISK": str(self._control)}

    def set(self, bytes_per_s: float, latency_s: float = 0.0) -> None:
        """From the next read on. 0: as fast as it is."""
        if self._control.exists():
            with self._control.open("r+b") as file:  # the same file: it is mapped
                file.write(_CONTROL.pack(bytes_per_s, latency_s))
        else:
            self._control.write_bytes(_CONTROL.pack(bytes_per_s, latency_s))
