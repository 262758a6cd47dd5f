"""Notices that a worker's weights were replaced while it runs, so that pages of the old ones are never given back.

SGLang tells no storage backend about online updates (/update_weights_from_disk, _tensor, _distributed, _ipc; read in
sglang 0.5.23, srt/managers/scheduler_components/weight_updater.py). Where it has plugin hooks, this module is loaded
through the entry point group "sglang.srt.plugins" and counts updates in the scheduler's process. What memory holds
after an update is known to nobody, so the worker gets an identity of its own then: shared by its ranks, which have
the same parent process, and by no other worker. An update takes seconds, and writes of pages that were computed before
it may still be waiting: until it ends, and SGLang has flushed its own cache, there is no identity that they could be
written under. Releases without hooks: restart the worker after an update.

Loaded into every SGLang process of an environment that has kvd installed: imports nothing until a hook runs.
"""

import os
import time
from collections.abc import Callable
from typing import Any

_CLASS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_UPDATES = ("update_weights_from_disk", "update_weights_from_tensor", "update_weights_from_distributed",
            "update_weights_from_ipc")  # fmt: skip

_updates = 0
_running = 0


def register() -> None:
    """Entry point. SGLang logs what goes wrong here and goes on."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name in _UPDATES:
        HookRegistry.register(f"{_CLASS}.{name}", update, HookType.AROUND)


def update(original: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """An update, whatever becomes of it: from its beginning on this worker's weights are nobody else's."""
    global _updates, _running
    _running += 1  # before the count: no moment may look as if it were over
    _updates += 1
    try:
        return original(*args, **more)
    finally:
        _running -= 1


def running() -> bool:
    """Whether one is going on: weights are partly these and partly those."""
    return _running > 0


def epoch() -> str:
    """Empty until the first update; then a name that this worker's ranks share, and nobody else."""
    if not _updates:
        return ""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat") as stat:
            born = stat.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        born = str(time.monotonic_ns())  # then ranks do not share, which is safe
    return f"{parent}.{born}.{_updates}"
