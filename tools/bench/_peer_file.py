"""SGLang's `file` storage backend, as HiCache's generic path calls it. Run with the SGLang environment's Python.

    _peer_file.py FOLDER      requests: hello | open {page_bytes, pages} | round {n}

Only `batch_set` and `batch_get` are timed, with flat contiguous tensors made before: the copies that SGLang itself
makes between those and its host pool are left out, in the reference's favour. The files of a round are removed
after it, untimed.
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
        pattern = (torch.arange(page_bytes, dtype=torch.int64) % 251).to(torch.uint8)
        self.values = [pattern.clone().view(torch.bfloat16) for _ in range(pages)]
        self.targets = [torch.ones_like(value) for value in self.values]

    def round(self, number: int) -> dict[str, float]:
        keys = [f"{number:032x}{page:032x}" for page in range(len(self.values))]
        started = time.perf_counter()
        stored = self.backend.batch_set(keys, self.values)
        middle = time.perf_counter()
        loaded = self.backend.batch_get(keys, self.targets)
        ended = time.perf_counter()
        assert stored, "batch_set failed"
        assert all(page is not None for page in loaded), "batch_get failed"
        assert torch.equal(self.targets[-1].view(torch.uint8), self.values[-1].view(torch.uint8)), "other bytes"
        for file in self.folder.glob("*.bin"):
            file.unlink()
        return {"set_s": middle - started, "get_s": ended - middle}


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
            answer = store.round(request["n"])
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
