"""Lets an unmodified SGLang run on a machine without a GPU, for tests.

SGLang loads this through its own entry points, in each of its processes: a platform (`platform.py`)
and what HiCache lacks on a CPU (`hicache.py`, `kv_copies.py`).
Never does: edit or wrap SGLang's files, act on a machine where torch sees a GPU, claim GPU speed or ordering.
"""

import torch

PLATFORM = "sglang_cpu_platform.platform.CpuTorchPlatform"


def activate() -> str | None:
    """The platform's class for SGLang's discovery, or None where a GPU should be used instead."""
    return None if torch.cuda.is_available() else PLATFORM
