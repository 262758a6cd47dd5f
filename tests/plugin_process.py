"""A worker process with the plugin in it, for tests that kill or stop workers: obeys one line of JSON at a time.

    python -m tests.plugin_process SOCKET [WEIGHTS] [TP_RANK TP_SIZE] [PORT SEED]

Pages are filled with bytes that follow from their key, so that any other process can tell right from wrong.
"""

import json
import random
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from kvd import wire
from kvd.sidecar import copier, engine, hicache
from tests.sglang_controller import pools

PAGE_TOKENS, PAGES = 4, 512


def page_bytes(key: str, rank: int, size: int) -> bytes:
    return random.Random(f"{key}/{rank}").randbytes(size)


class Worker:
    """One rank."""

    def __init__(self, socket: str, weights: str = "w", rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.pool = pools.MHATokenToKVPoolHost(
            page_size=PAGE_TOKENS, page_num=PAGES, layer_num=4, head_num=4, head_dim=64, dtype=torch.float16
        )
        self.page_bytes = 2 * 4 * 4 * 64 * 2 * PAGE_TOKENS
        kvd = {"socket": socket, "weights_id": weights}
        config = SimpleNamespace(
            tp_rank=rank,
            tp_size=size,
            is_mla_model=False,
            model_name="m",
            extra_config={"interface_v1": 1, "kvd": kvd},
        )
        self.plugin = hicache.KvdStorage(config, {})
        self.plugin.register_mem_pool_host(self.pool)

    def wait(self) -> bool:
        deadline = time.monotonic() + 60
        while not self.plugin.ready and time.monotonic() < deadline:
            time.sleep(0.005)
        return bool(self.plugin.ready)

    def put(self, keys: list[str]) -> list[bool]:
        data = b"".join(page_bytes(key, self.rank, self.page_bytes) for key in keys)
        self._write(range(len(keys)), data)
        return list(self.plugin.batch_set_v1(keys, pools.page_slots(self.pool, list(range(len(keys))))))

    def _write(self, pages: Any, data: bytes) -> None:
        for n, page in enumerate(pages):
            piece = torch.frombuffer(
                bytearray(data[n * self.page_bytes : (n + 1) * self.page_bytes]), dtype=torch.float16
            )
            self.pool.set_from_flat_data_page(page * PAGE_TOKENS, piece)

    def take(self, keys: list[str]) -> list[str]:
        """For each page "right", "WRONG" or "miss"."""
        pages = list(range(PAGES - len(keys), PAGES))
        pools.wipe_pages(self.pool, pages)
        got = self.plugin.batch_get_v1(keys, pools.page_slots(self.pool, pages))
        answers = []
        for key, page, there in zip(keys, pages, got, strict=True):
            if not there:
                answers.append("miss")
                continue
            data = (
                self.pool.get_data_page(page * PAGE_TOKENS, flat=True).contiguous().view(torch.uint8).numpy().tobytes()
            )
            answers.append("right" if data == page_bytes(key, self.rank, self.page_bytes) else "WRONG")
        return answers

    def obey(self, order: dict[str, Any]) -> Any:
        match order["do"]:
            case "wait":
                return self.wait()
            case "put":
                return self.put(order["keys"])
            case "take":
                return self.take(order["keys"])
            case "exists":
                return self.plugin.batch_exists(order["keys"])
            case "circuit":
                return self.plugin.circuit
            case "stats":
                return self.plugin.stats()
            case "hang_in_copy":  # from here on every copy stops after the reservation or lease was granted
                copier.Copier.store = copier.Copier.load = lambda *_, **__: time.sleep(3600)  # type: ignore[assignment]
                return True
            case "close":
                self.plugin.close()
                return True
        raise ValueError(order)


def main() -> None:
    socket, *rest = sys.argv[1:]
    weights = rest[0] if rest else "w"
    rank, size = (int(rest[1]), int(rest[2])) if len(rest) > 2 else (0, 1)
    if len(rest) > 4:  # what SGLang would tell the plugin of its server
        engine.server_args = lambda: SimpleNamespace(port=int(rest[3]), random_seed=int(rest[4]))  # type: ignore[assignment]
    worker = Worker(socket, weights, rank, size)
    assert wire.PROTOCOL
    for line in sys.stdin:
        started = time.monotonic()
        answer = worker.obey(json.loads(line))
        print(json.dumps({"answer": answer, "seconds": time.monotonic() - started}), flush=True)
    worker.plugin.close()


if __name__ == "__main__":
    main()
