"""How fast do pages go through the plugin and the daemon, next to memcpy and to other stores?

Set and get of 128-page batches through the real plugin class (`batch_set_v1`, `batch_get_v1`, checksums on, default
settings, page_first host pools) against a real daemon with a faulted arena, in GB/s (1e9 bytes). Every set writes:
keys are new each time, and the arena is emptied between rounds, untimed. The row "arena full" never empties it: there
each set must evict first.

References, measured in turn with ours: memmove of the same pages one by one, in one thread (and in two, because the
plugin has two copy threads by default), into shared memory already faulted in; SGLang's `file` backend on tmpfs, the
kindest place for it (`--file-dir` for another); Mooncake Store over loopback TCP with its memory in another process.
"""

import argparse
import ctypes
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from kvd.sidecar.copier import Copier, Unchecked
from kvd.sidecar.hicache import KvdStorage
from tests.harness import Daemon
from tools.bench._kvd import attach, empty, fresh_keys, mha_pool, mla_pool, page_bytes, running_daemon, scratch, slots
from tools.bench._peers import MOONCAKE, Missing, Peer, file_peer, mooncake_peer
from tools.bench._table import MIB, Options, Run, Samples, Table, finish, interleave, options, progress, spread, timed

PAGES = 128
POOLS: dict[str, Callable[[], Any]] = {
    "256 KiB": lambda: mha_pool(tokens=16, layers=32, heads=1, pages=2 * PAGES),
    "1 MiB": lambda: mha_pool(tokens=64, layers=32, heads=1, pages=2 * PAGES),
    "2.6 MiB": lambda: mha_pool(tokens=64, layers=42, heads=2, pages=2 * PAGES),
    "1.07 MiB MLA": lambda: mla_pool(tokens=16, layers=61, pages=2 * PAGES),
}
KEY = "1 MiB"  # the size that the ratios are of


def main() -> None:
    wanted = options(__doc__, _add_options)
    table = Table(
        "Host pages, 128 a batch: GB/s, median (min..max)", ("pages", "case", "set", "get", "set/memcpy", "get/memcpy")
    )
    results: dict[str, Samples] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        peers = _start_peers(stack, folder, wanted, table)
        for size, make_pool in POOLS.items():
            results[size] = _measure(size, make_pool(), folder / size.replace(" ", ""), peers, wanted)
            _add_rows(table, size, results[size])
    one = results[KEY]
    ratios = {
        f"{what}_vs_{key}": one.ratio(f"kvd {what}", f"{reference} {what}")
        for key, reference in (("memcpy", "memcpy"), ("mooncake", "mooncake"), ("file", "sglang file"))
        for what in ("set", "get")
    }
    both = [_times(one.ratio(f"kvd {what}", f"memcpy 2t {what}")) for what in ("set", "get")]
    table.notes.append(f"{KEY}, of memcpy with 2 threads: kvd set {both[0]}, get {both[1]}")
    figures = {
        f"{size} {name}": round(one_size.median(name) or 0, 3)
        for size, one_size in results.items()
        for name in one_size.rounds
    }
    finish("host_path", table, wanted, ratios, figures)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file-dir", type=Path, default=Path("/dev/shm"), help="where SGLang's file backend writes")
    parser.add_argument("--no-peers", action="store_true", help="only kvd and memcpy")


def _start_peers(stack: ExitStack, folder: Path, wanted: Options, table: Table) -> dict[str, Peer]:
    peers: dict[str, Peer] = {}
    if wanted.rest.no_peers:
        return peers
    file_dir: Path = wanted.rest.file_dir
    table.notes.append(
        f"sglang file: HiCacheFile of 0.5.23 in {file_dir} ({_file_system(file_dir)}), as its controller drives it"
    )
    table.notes.append(f"mooncake: {MOONCAKE}, loopback TCP, one object a page, registered buffers")
    store = stack.enter_context(scratch(file_dir))
    starts: dict[str, Callable[[], AbstractContextManager[Peer]]] = {
        "sglang file": lambda: file_peer(folder, store),
        "mooncake": lambda: mooncake_peer(folder, 2 * PAGES * 3 * MIB),
    }
    for name, start in starts.items():
        try:
            peers[name] = stack.enter_context(start())
        except (Missing, StopIteration) as why:
            progress(f"{name} is missing: {why}")
            table.notes.append(f"{name} is missing: {why}")
    return peers


def _measure(size: str, pool: Any, folder: Path, peers: dict[str, Peer], wanted: Options) -> Samples:
    progress(f"{size}: {page_bytes(pool)} bytes a page")
    arena_mib = max(640, 4 * PAGES * page_bytes(pool) // MIB)
    with ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(folder, arena_mib))
        mla = "MLA" in size
        cases = [_memcpy("memcpy", pool, 1), _memcpy("memcpy 2t", pool, 2)]
        variants: list[tuple[str, dict[str, int]]] = [("kvd", {}), ("kvd 1 thread", {"copy_threads": 1})]
        if size == KEY:
            variants.append(("kvd, no checksum", {}))
        for name, settings in variants:
            plugin = attach(daemon, pool, mla, settings=settings)
            stack.callback(plugin.close)
            if "no checksum" in name:
                _without_checksums(plugin)
            cases.append(_through_plugin(name, plugin, pool, daemon))
        if size == KEY:
            full = stack.enter_context(running_daemon(folder / "full", 320))
            plugin = attach(full, pool)
            stack.callback(plugin.close)
            cases.append(_through_plugin("kvd, arena full", plugin, pool, None))
        for name, peer in peers.items():
            if mla or (wanted.quick and size != KEY):
                continue
            try:
                peer.ask(do="open", page_bytes=page_bytes(pool), pages=PAGES)
            except Missing as why:
                progress(f"{name} at {size}: {why}")
                continue
            cases.append(_through_peer(name, peer, page_bytes(pool)))
        return interleave(cases, wanted.rounds(5, 21), warm_up=2)


def _memcpy(name: str, pool: Any, threads: int) -> Run:
    """The pool's pages into shared memory and back, as the plugin gets them: two pieces a page, or one."""
    length = page_bytes(pool)
    shared = np.frombuffer(mmap.mmap(-1, PAGES * length), dtype=np.uint8)
    shared[:] = 1
    base = shared.ctypes.data
    pointers, sizes = pool.get_page_buffer_meta(slots(pool, range(2 * PAGES)))
    pieces = len(pointers) // (2 * PAGES)
    half = pieces * PAGES
    moves = []
    at = base
    for pointer, size in zip(pointers[:half], sizes, strict=False):
        moves.append((at, pointer, size))
        at += size
    back = [(pointer, place, size) for pointer, (place, _, size) in zip(pointers[half:], moves, strict=True)]
    keep = shared

    def case(_: int) -> Mapping[str, float]:
        assert keep.nbytes
        total = PAGES * length / 1e9
        return {
            f"{name} set": total / timed(_move, moves, threads)[0],
            f"{name} get": total / timed(_move, back, threads)[0],
        }

    return case


def _move(moves: Sequence[tuple[int, int, int]], threads: int) -> None:
    def part(mine: Sequence[tuple[int, int, int]]) -> None:
        memmove = ctypes.memmove
        for target, source, size in mine:
            memmove(target, source, size)

    share = -(-len(moves) // threads)
    helpers = [threading.Thread(target=part, args=(moves[at : at + share],)) for at in range(share, len(moves), share)]
    for helper in helpers:
        helper.start()
    part(moves[:share])
    for helper in helpers:
        helper.join()


def _through_plugin(name: str, plugin: KvdStorage, pool: Any, daemon: Daemon | None) -> Run:
    """Set pages 0..127 under new keys, get them into pages 128..255; then empty `daemon`, unless there is none."""
    sources, targets = slots(pool, range(PAGES)), slots(pool, range(PAGES, 2 * PAGES))
    total = PAGES * page_bytes(pool) / 1e9

    def case(number: int) -> Mapping[str, float]:
        keys = fresh_keys(PAGES)
        set_s, stored = timed(plugin.batch_set_v1, keys, sources)
        get_s, loaded = timed(plugin.batch_get_v1, keys, targets)
        assert all(stored), f"{name}: not stored: {plugin.stats()}"
        assert all(loaded), f"{name}: {sum(loaded)} of {PAGES} pages came back: {plugin.stats()}"
        if number < 0:
            last = pool.page_size
            assert (pool.get_data_page((PAGES - 1) * last) == pool.get_data_page((2 * PAGES - 1) * last)).all()
        if daemon is not None:
            empty(daemon)
        return {f"{name} set": total / set_s, f"{name} get": total / get_s}

    return case


def _without_checksums(plugin: KvdStorage) -> None:
    assert plugin._shelves is not None
    copier = Copier(plugin._shelves.config.copy_threads, Unchecked)
    plugin._shelves.copier.close()
    plugin._shelves.copier = copier
    for shelf in plugin._shelves._shelves.values():
        shelf._copier = copier


def _through_peer(name: str, peer: Peer, length: int) -> Run:
    total = PAGES * length / 1e9

    def case(number: int) -> Mapping[str, float]:
        try:
            took = peer.ask(do="round", n=number + 1000)
        except Missing as why:
            progress(str(why))
            return {}
        return {f"{name} set": total / took["set_s"], f"{name} get": total / took["get_s"]}

    return case


def _add_rows(table: Table, size: str, samples: Samples) -> None:
    names = [name.removesuffix(" set") for name in samples.rounds if name.endswith(" set")]
    for name in [*names, *(p for p in ("sglang file", "mooncake") if size == KEY and p not in names)]:
        ratios = [samples.ratio(f"{name} {what}", f"memcpy {what}") for what in ("set", "get")]
        cells = [spread(samples.rounds.get(f"{name} {what}")) for what in ("set", "get")]
        table.add(size, name, *cells, *(_times(ratio) for ratio in ratios))


def _times(ratio: float | None) -> str:
    return "missing" if ratio is None else f"{ratio:.2f}"


def _file_system(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(m[1]), m[2]) for m in mounts if folder.resolve().is_relative_to(m[1])]
    return max(inside)[1] if inside else "unknown file system"


if __name__ == "__main__":
    main()
