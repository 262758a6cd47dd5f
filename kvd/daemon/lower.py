"""The node and its lower tiers, tied: what they hold is shown, what is new goes there, what is wanted comes up."""

import asyncio
import importlib
import socket
import time
from functools import partial
from typing import Any

from kvd.daemon.below import Below
from kvd.daemon.room import Room
from kvd.settings import DaemonSettings

NVME, SHARED = 1, 2  # bits in the index; the faster one is asked first
_PATIENCE_S = {NVME: 10.0, SHARED: 60.0}


def open_lower(settings: DaemonSettings, room: Room) -> list[Below]:
    """The tiers' processes, to be ticked. Call it on the event loop."""
    node = room.node
    node.promotion.clock = time.monotonic
    loop = asyncio.get_running_loop()

    def opened(bit: int, name: str, chosen: dict[str, Any], write_delay_s: float) -> Below:
        def works() -> None:
            writeback.everything(time.monotonic())

        def measured(size: int, seconds: float) -> None:
            disk.observe(size, seconds, time.monotonic())

        changed, forgotten = partial(node.stock.below_changed, bit), partial(node.stock.below_forgotten, bit)
        below = Below(name, chosen, room.memory.fd, changed, forgotten, works, measured, _PATIENCE_S[bit])
        writeback = node.add_tier(bit, below, write_delay_s)
        writeback.more = partial(loop.call_soon, lambda: writeback.tick(time.monotonic()))
        disk = node.promotion.tiers[-1].disk
        return below

    found: list[Below] = []
    nvme, shared = settings.nvme, settings.shared
    if nvme.path is not None:
        chosen = nvme.model_dump(mode="json", exclude={"write_delay_s"})
        chosen["shares"] = {n: (s.nvme_reserve_bytes, s.nvme_burst_bytes) for n, s in settings.tenants.items()}
        found.append(opened(NVME, "nvme", chosen, nvme.write_delay_s))
    if shared.uri is not None:
        chosen = shared.model_dump(mode="json", exclude={"write_delay_s"})
        chosen["node"] = shared.node or socket.gethostname()
        chosen["shares"] = {n: (s.shared_reserve_bytes, s.shared_burst_bytes) for n, s in settings.tenants.items()}
        found.append(opened(SHARED, "shared", chosen, shared.write_delay_s))
    if found:
        importlib.import_module("kvd.indexmany")  # it brings numpy: 0.1 s that workers would wait for later
    return found
