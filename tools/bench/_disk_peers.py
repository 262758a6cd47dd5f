"""Other ways to keep pages on a disk, as cases of the `nvme` benchmark, each in a process and environment of its own.

lmdb, rocksdb, sqlite: pages as values, synchronous, a batch a commit. sglang-file: SGLang's own `file` backend;
lmcache: LMCache's local disk backend; both write files through the kernel's cache and never sync. To be compared with
what is durable they are timed until their files are synced; without that it is their "unsynced". Each stands still
while the others are measured.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tools.bench._peers import Missing, Peer, file_peer, made_environment, start_peer
from tools.bench._table import Run, progress

VALUES = ("lmdb", "rocksdb", "sqlite")
PEERS = (*VALUES, "sglang-file", "lmcache")
VALUE_PACKAGES = ("lmdb>=1.6", "rocksdict>=0.3.26")
LMCACHE_PACKAGES = ("torch==2.13.0", "lmcache==0.5.6")


@contextmanager
def peer_case(kind: str, folder: Path, page_bytes: int, held: int, batch: int, pages: int) -> Iterator[Run]:
    """Writes and cold reads of `pages` pages, in GB/s. `held`: what it holds. Raises Missing where it cannot run."""
    total = pages * page_bytes / 1e9
    with _started(kind, folder, page_bytes, held, batch, pages) as peer:
        peer.rests = True

        def case(number: int) -> Mapping[str, float]:
            try:
                figures = _file_round(peer, number) if kind == "sglang-file" else _round(peer, pages)
            except Missing as why:
                progress(str(why))
                return {}
            return {f"{kind} {what}": total / seconds for what, seconds in figures.items()}

        yield case


@contextmanager
def _started(kind: str, folder: Path, page_bytes: int, held: int, batch: int, pages: int) -> Iterator[Peer]:
    if kind == "sglang-file":
        with file_peer(folder, folder / kind) as peer:
            peer.ask(do="open", page_bytes=page_bytes, pages=pages)
            yield peer
        return
    if kind == "lmcache":
        venv = made_environment("lmcache", LMCACHE_PACKAGES, "LMCache (2 GB, some minutes, once)")
        script, arguments = "_peer_lmcache.py", [str(folder / kind), str(page_bytes), str(held)]
    else:
        venv = made_environment("values", VALUE_PACKAGES, "LMDB and RocksDB (a minute, once)")
        script, arguments = "_peer_values.py", [kind, str(folder / kind), str(page_bytes), str(held), str(batch)]
    with start_peer(kind, venv, script, arguments, folder) as peer:
        yield peer


def _round(peer: Peer, pages: int) -> dict[str, float]:
    wrote = peer.ask(do="write", pages=pages)
    found = {"write": wrote["s"], "read": peer.ask(do="read", pages=pages)["s"]}
    return {**found, "unsynced": wrote["unsynced_s"]} if "unsynced_s" in wrote else found


def _file_round(peer: Peer, number: int) -> dict[str, float]:
    found = peer.ask(do="round", n=number + 1000, cold=True)
    return {"write": found["set_s"] + found["sync_s"], "read": found["get_s"], "unsynced": found["set_s"]}
