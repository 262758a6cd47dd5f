"""A GPU driver that answers, or hangs: nobody who asks kvd waits for it. Its library is a stand-in."""

from pathlib import Path

import pytest

from tests.harness import Daemon, eventually

_DRIVER = """
import time
class NVMLError(Exception): pass
def nvmlInit(): time.sleep({seconds})
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlDeviceGetName(handle): return f"GPU {{handle}}"
"""


def with_driver(folder: Path, seconds: float) -> Daemon:
    (folder / "pynvml.py").write_text(_DRIVER.format(seconds=seconds))
    daemon = Daemon(folder / "run")
    daemon.env["PYTHONPATH"] = str(folder)
    return daemon


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_status_tells_the_gpus_and_waits_for_no_driver(tmp_path: Path, seconds: float) -> None:
    with with_driver(tmp_path, seconds) as daemon:  # which stops, too
        if seconds:
            assert daemon.status().gpus == []
        else:
            eventually(lambda: daemon.status().gpus == ["GPU 0", "GPU 1"], 10)
