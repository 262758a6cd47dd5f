"""The node and its NVMe tier, tied: what it holds is shown, what is new goes there, what is wanted comes up."""

import time

from kvd.daemon.below import Below
from kvd.daemon.room import Room
from kvd.settings import DaemonSettings


def open_nvme(settings: DaemonSettings, room: Room) -> Below | None:
    """The tier's process, to be ticked; None where there is none. Call it on the event loop."""
    if settings.nvme.path is None:
        return None
    node = room.node
    chosen = settings.nvme.model_dump(mode="json", include={"path", "size_bytes", "segment_bytes", "threads"})

    def works() -> None:
        node.writeback.everything(time.monotonic())

    stock = node.stock
    below = Below("nvme", chosen, room.memory.fd, stock.below_changed, stock.below_forgotten, works)
    node.promotion.source = node.writeback.sink = below
    node.promotion.clock = time.monotonic
    node.writeback.delay_s = settings.nvme.write_delay_s
    return below
