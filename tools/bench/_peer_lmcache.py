"""Runs in `.venvs/lmcache`: LMCache's LocalDiskBackend without a GPU, driven by lines of JSON, each timed here.

    python _peer_lmcache.py FOLDER PAGE_BYTES PAGES      requests: hello | write {pages} | read {pages}

As it comes, but for a memory pool large enough: one file a page through the kernel's cache, four threads. Written is
what `batched_submit_put_task` was given and its files were synced for, cyclic over PAGES keys (what a key held is
removed before, untimed); read are random pages into that pool, after the kernel's cache of the files was dropped.
In its favour: nothing is copied out of the pool.
"""

import asyncio
import json
import logging
import os
import queue
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

MIB = 1 << 20


class DiskStore:
    def __init__(self, folder: Path, page_bytes: int, pages: int) -> None:
        self.folder, self.page_bytes = folder, page_bytes
        total = pages * page_bytes / (1 << 30)
        config = LMCacheEngineConfig.from_defaults(
            local_cpu=False, max_local_cpu_size=total + 0.5, local_disk=str(folder), max_local_disk_size=2 * total
        )
        shape = (1, 2, page_bytes // 4, 1, 1)
        metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, shape)
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self.memory = LocalCPUBackend(config, metadata, dst_device="cpu")
        self.disk = LocalDiskBackend(config, loop, self.memory, dst_device="cpu")
        self.keys = [CacheEngineKey("bench", 1, 0, number, torch.bfloat16) for number in range(pages)]
        self.written = 0

    def _allocate(self) -> MemoryObj:
        found = self.memory.allocate(torch.Size([self.page_bytes // 2]), torch.bfloat16, MemoryFormat.KV_2LTD)
        assert found is not None, "its memory pool is too small"
        return found

    def write(self, pages: int) -> dict[str, float]:
        keys = [self.keys[(self.written + n) % len(self.keys)] for n in range(pages)]
        self.written += pages
        for key in keys:
            self.disk.remove(key)
        objects = [self._allocate() for _ in keys]
        for number, found in enumerate(objects):
            found.tensor.fill_(number)
        done: queue.SimpleQueue[CacheEngineKey] = queue.SimpleQueue()
        started = time.perf_counter()
        self.disk.batched_submit_put_task(keys, objects, on_complete_callback=done.put)
        for _ in keys:
            done.get(timeout=60)
        middle = time.perf_counter()
        for key in keys:
            descriptor = os.open(self.disk._key_to_path(key), os.O_RDONLY)
            os.fdatasync(descriptor)
            os.close(descriptor)
        ended = time.perf_counter()
        for found in objects:
            found.ref_count_down()
        return {"s": ended - started, "unsynced_s": middle - started}

    def read(self, pages: int) -> dict[str, float]:
        for path in self.folder.rglob("*.pt"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        asked = random.sample(self.keys[: self.written], pages)
        started = time.perf_counter()
        found = self.disk.batched_get_blocking(asked)
        ended = time.perf_counter()
        assert all(each is not None for each in found), "a page is not there"
        for each in found:
            each.ref_count_down()
        return {"s": ended - started}


def main() -> None:
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    store = DiskStore(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] in ("write", "read"):
            answer = getattr(store, request["do"])(request["pages"])
        print(json.dumps(answer), file=replies, flush=True)
    os._exit(0)  # its threads have no end


if __name__ == "__main__":
    main()
