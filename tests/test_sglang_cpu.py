"""What the CPU platform plugin gives the SGLang of the tests, asked through SGLang's own loader."""

from tests.sglang_node import needs_sglang, told_by_sglang

DOUBLED = """
import torch
from sglang.srt.plugins import load_plugins

subnormal = torch.full((64,), 1e-41)
before = int((subnormal * 2).count_nonzero())
load_plugins()
print(before, int((subnormal * 2).count_nonzero()))
"""


@needs_sglang
def test_a_worker_does_not_compute_with_subnormals() -> None:
    """`torch_native` multiplies uninitialised memory; where that was small integers, a prompt took a minute."""
    assert told_by_sglang(DOUBLED).splitlines()[-1] == "64 0", "how many are not zero, without the plugin and with it"
