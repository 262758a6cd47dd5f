"""One Mooncake Store process. Run with the Mooncake environment's Python.

    _peer_mooncake.py MASTER SEGMENT_BYTES      requests: hello | open {page_bytes, pages} | round {n}

With a segment it owns memory of the store; with none it is a client of the process that does, over TCP. A page is
one object and one registered buffer (SGLang's own backend makes two objects of half the size: slower), moved by
`batch_put_from` and `batch_get_into`. Each round's objects are removed after it, untimed.
"""

import json
import mmap
import os
import sys
import time
from typing import Any

import numpy as np
from mooncake.store import MooncakeDistributedStore


class Client:
    def __init__(self, store: Any, page_bytes: int, pages: int) -> None:
        self.store, self.page_bytes, self.pages = store, page_bytes, pages
        total = page_bytes * pages
        self.memory = np.frombuffer(mmap.mmap(-1, 2 * total), dtype=np.uint8)
        self.memory[:total] = np.resize(np.arange(251, dtype=np.uint8), total)
        self.memory[total:] = 1
        base = self.memory.ctypes.data
        code = store.register_buffer(base, 2 * total)
        assert code == 0, f"register_buffer: {code}"
        self.sources = [base + page * page_bytes for page in range(pages)]
        self.targets = [base + total + page * page_bytes for page in range(pages)]

    def round(self, number: int) -> dict[str, float]:
        keys = [f"{os.getpid()}-{self.page_bytes}-{number}-{page}" for page in range(self.pages)]
        sizes = [self.page_bytes] * self.pages
        started = time.perf_counter()
        stored = self.store.batch_put_from(keys, self.sources, sizes)
        middle = time.perf_counter()
        loaded = self.store.batch_get_into(keys, self.targets, sizes)
        ended = time.perf_counter()
        assert not any(stored), f"batch_put_from: {min(stored)}"
        assert set(loaded) == {self.page_bytes}, f"batch_get_into: {min(loaded)}"
        total = self.page_bytes * self.pages
        assert np.array_equal(self.memory[total - 4096 : total], self.memory[-4096:]), "other bytes"
        self.store.remove_all(True)
        return {"set_s": middle - started, "get_s": ended - middle}

    def close(self) -> None:
        self.store.unregister_buffer(self.memory.ctypes.data)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")  # the library logs to stdout
    os.dup2(2, 1)
    store = MooncakeDistributedStore()
    master, segment = sys.argv[1], int(sys.argv[2])
    code = store.setup("127.0.0.1", "P2PHANDSHAKE", segment, 16 << 20, "tcp", "", master)
    client: Client | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if code:
            answer = {"error": f"setup: {code}"}
        elif request["do"] == "open":
            if client is not None:
                client.close()
            client = Client(store, request["page_bytes"], request["pages"])
        elif request["do"] == "round":
            assert client is not None, "open first"
            try:
                answer = client.round(request["n"])
            except AssertionError as error:
                answer = {"error": str(error)}
        print(json.dumps(answer), file=replies, flush=True)
    store.close()


if __name__ == "__main__":
    main()
