"""Flushes subnormal floats to zero in the thread that runs the model.

SGLang's `torch_native` attention pads the queries of a cached prefix with uninitialised memory and throws their
rows away. Where that memory last held small integers, each is a subnormal float, and Intel processors multiply
those 75 times slower: the same request over 1,280 cached tokens took 0.9 s or 50 s.
Never does: change a row that SGLang keeps by more than a subnormal is worth, or act where torch sees a GPU.
"""

import torch


def register() -> None:
    """SGLang calls this in each of its processes, in the main thread, which is the one that computes."""
    if not torch.cuda.is_available():
        torch.set_flush_denormal(True)
