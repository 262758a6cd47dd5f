"""How soon does a router that comes late know all that a node holds?

A real kvd follows a scripted worker that speaks SGLang's frames and holds 10^6 blocks; a router's view connects, asks
for a snapshot, and fills an index. Seconds from its first socket to an exact view, in the same process as the view.

    chains   10^6 blocks in chains of 256: prompts of 16,384 tokens in blocks of 64
    lone     the same number of blocks, none the child of another: the worst that a snapshot can look like

The index is the router's own, and so is how seldom Python looks for garbage.
"""

import gc
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from kvd.router.index import Index
from kvd.router.main import COLLECT_AFTER
from tests.event_stream import Router, ScriptedWorker
from tests.harness import Daemon
from tools.bench._table import Table, finish, interleave, options, progress, spread

BLOCKS = 1_000_000
CASES = {"chains": 256, "lone": 1}


def main() -> None:
    wanted = options(__doc__)
    gc.set_threshold(*COLLECT_AFTER)
    with ExitStack() as stack:
        endpoints = {name: _node(stack, name, chain) for name, chain in CASES.items()}
        samples = interleave([partial(_late_router, name, at) for name, at in endpoints.items()], wanted.rounds(3, 9))
    table = Table(
        f"a late router: seconds until it knows {BLOCKS:,} blocks exactly", ("blocks", "seconds", "blocks/s")
    )
    for name in CASES:
        seconds = samples.median(name)
        table.add(name, spread(samples.rounds.get(name)), f"{BLOCKS / seconds:,.0f}" if seconds else "missing")
    finish("events", table, wanted, {}, {f"{name}_s": round(samples.median(name) or 0, 3) for name in CASES})


def _node(stack: ExitStack, name: str, chain: int) -> str:
    """A kvd that knows a worker's blocks; where it publishes."""
    progress(f"a worker stores {BLOCKS:,} blocks: {name}")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvd-"))
    endpoint = f"ipc://{folder}/events"
    worker = stack.enter_context(ScriptedWorker(steps=BLOCKS))
    worker.do("fill", blocks=BLOCKS, chain=chain)
    settings = {"events__endpoint": endpoint, "events__workers": f'["{worker.url}"]'}
    stack.enter_context(Daemon(Path(folder) / "run", **settings))
    with Router(endpoint, Index(2 * BLOCKS)) as router:
        router.until(lambda: not router.why and router.source_why(worker.url) == "", 300)
        assert router.index.stats().blocks == BLOCKS, router.index.stats()
    return endpoint


def _late_router(name: str, endpoint: str, _: int) -> Mapping[str, float]:
    started = time.perf_counter()
    with Router(endpoint, Index(2 * BLOCKS)) as router:
        router.until(lambda: not router.why, 60)
        seconds = time.perf_counter() - started
        assert router.index.stats().blocks == BLOCKS, router.index.stats()
    return {name: seconds}


if __name__ == "__main__":
    main()
