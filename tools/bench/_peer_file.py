"""SGLang's `file` storage backend, as HiCache's generic path calls it. Run with the SGLang environment's Python.

    _peer_file.py FOLDER      requests: hello | open {page_bytes, pages} | round {n, cold}

The same work as ours: pages of a page_first host pool to storage and back. Timed is what the controller does for it
(sglang 0.5.23, managers/cache_controller.py, _generic_page_set and _generic_page_get): a flat copy of each page and
`batch_set`; an empty page for each key, `batch_get` and the copy into the pool. The files of a round are removed after
it, untimed. In the reference's favour: the empty pages are not pinned. With `cold` the files are synced after they
were written, timed on its own, and the kernel's cache of them is dropped before they are read.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig


class FileStore:
    def __init__(self, folder: Path, page_bytes: int, pages: int) -> None:
        fields = HiCacheStorageConfig.__dataclass_fields__
        known: dict[str, Any] = {
            "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1,
            "is_mla_model": False, "enable_storage_metrics": False, "is_page_first_layout": True,
            "model_name": "bench",
        }  # fmt: skip
        self.folder = folder
        self.backend = HiCacheFile(
            HiCacheStorageConfig(**{name: value for name, value in known.items() if name in fields}), str(folder)
        )
        pattern = (torch.arange(page_bytes // 2 * pages, dtype=torch.int64) % 251).to(torch.uint8)
        # K and V halves, then pages: page n is pool[:, n], two pieces.
        self.pool = torch.stack([pattern, pattern.flip(0)]).view(torch.bfloat16).view(2, pages, -1)
        self.back = torch.ones_like(self.pool)

    def _sync_and_drop(self) -> None:
        for file in self.folder.glob("*.bin"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def round(self, number: int, cold: bool) -> dict[str, float]:
        pages = self.pool.shape[1]
        keys = [f"{number:032x}{page:032x}" for page in range(pages)]
        started = time.perf_counter()
        values = [self.pool[:, page].flatten() for page in range(pages)]
        stored = self.backend.batch_set(keys, values)
        written = time.perf_counter()
        if cold:
            self._sync_and_drop()
        middle = time.perf_counter()
        empty = [torch.zeros((2, self.pool.shape[2]), dtype=self.pool.dtype).flatten() for _ in keys]
        loaded = self.backend.batch_get(keys, empty)
        for page, data in enumerate(loaded):
            self.back[:, page] = data.reshape(2, -1)
        ended = time.perf_counter()
        assert stored, "batch_set failed"
        assert torch.equal(self.back[:, -1].view(torch.uint8), self.pool[:, -1].view(torch.uint8)), "other bytes"
        self.back.zero_()
        for file in self.folder.glob("*.bin"):
            file.unlink()
        return {"set_s": written - started, "sync_s": middle - written, "get_s": ended - middle}


def main() -> None:
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    store: FileStore | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "open":
            store = None  # before the new one takes its memory
            store = FileStore(Path(sys.argv[1]), request["page_bytes"], request["pages"])
        elif request["do"] == "round":
            assert store is not None, "open first"
            answer = store.round(request["n"], request.get("cold", False))
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
