"""The NVMe tier: payloads in segment files, what is where in a catalog. Implements `kvd.storage.tier.Tier`.

    FOLDER/lock                 held (flock) by the one process that has the tier open
    FOLDER/catalog/             see catalog.py
    FOLDER/segment-00000.kvd    see segments.py

A put is: take free slots; payloads, several in flight; barrier on each segment written; one commit that inserts the
new records and deletes those of the pages evicted to have free slots for the next put. A victim's slot is reused only
after that commit. So a crash at any instruction leaves each page in the catalog whole, and all others absent; what
was acknowledged survives power loss. Recovery reads the catalog and the segments' headers, never a payload.
"""

from kvd.storage.nvme.store import NvmeTier

__all__ = ["NvmeTier"]
