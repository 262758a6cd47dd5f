"""What the CPU platform plugin gives the SGLang of the tests, asked through SGLang's own loader."""

import subprocess

from tests.sglang_node import needs_sglang
from tools.demo.node import VENV
from tools.sglang_cpu.setup_env import environment_of

SMALLEST = """
import torch
from sglang.srt.plugins import load_plugins

subnormal = torch.full((64,), 1e-41)
assert (subnormal * 2).count_nonzero() == 64, "this processor flushes subnormals by itself"
load_plugins()
assert (subnormal * 2).count_nonzero() == 0, "subnormals are computed with"
"""


@needs_sglang
def test_a_worker_does_not_compute_with_subnormals() -> None:
    """`torch_native` multiplies uninitialised memory; where that was small integers, a prompt took a minute."""
    asked = subprocess.run(
        [str(VENV / "bin/python"), "-W", "ignore", "-c", SMALLEST],
        env=environment_of(VENV),
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
