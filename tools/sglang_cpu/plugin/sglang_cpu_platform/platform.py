"""The platform SGLang sees: a CPU, out of tree.

SGLang's in-tree CPU platform needs sgl_kernel's CPU build, which no index has. With the same device out
of tree, SGLang takes its torch-native allocator and writers, and every operator's `forward_native`.
Never does: offer graphs, Triton, pinned memory or HiCache device kernels.
"""

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class CpuTorchPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()  # each one False: no Triton, no graphs, no device kernels

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"
