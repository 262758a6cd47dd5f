"""How much of what is possible does the eviction policy gain over LRU, and what does it cost?

The production policy replays real traces in virtual time, next to LRU and Belady's optimum (OPT). A score is
(hit - LRU) / (OPT - LRU) of block hit rates. `mean_score` is the mean over the traces at 1,000 and 5,000 blocks (aim
0.35, at least 0.15); `worst_loss_points` is how far the policy falls below LRU anywhere, in percentage points (at
most 0.5). Time is CPU time per block asked for, the replay's own bookkeeping included. Bytes are those that a page
adds to a tier of a million, and those that any tier takes.

--quick leaves out the sizes where nearly everything fits.
"""

import math
import statistics
import sys
import time
import tracemalloc

from kvd.ctl.simulate.cache import hit_rate
from kvd.ctl.simulate.traces import Request, read
from kvd.storage.policy import Policy
from kvd.storage.worth import UNKNOWN, Worth
from tools.bench._table import ROOT, Table, finish, options, progress

DATA = ROOT.parent / "shared/data"
TRACES = {
    "conversation": DATA / "mooncake/conversation_trace.jsonl",
    "toolagent_like": DATA / "mooncake/toolagent_like.jsonl.gz",
    "weka_agent_dev": DATA / "agentic/weka_agent_dev_b512.jsonl.gz",
}
SCORED = (1000, 5000)
OTHERS = (10_000, 50_000)
QUICK = (10_000,)
SHOWN = ("s3fifo", "arc", "tinylfu")


def main() -> int:
    wanted = options(__doc__)
    sizes = SCORED + (QUICK if wanted.quick else OTHERS)
    table = Table(
        "Block hit rate by tier size in blocks",
        ("trace", "blocks", "kvd", "LRU", "OPT", *SHOWN, "score", "points over LRU", "us per block"),
    )
    scores: list[float] = []
    gains: list[float] = []
    times: list[float] = []
    rates: dict[str, dict[str, float]] = {}
    for name, path in TRACES.items():
        if not path.exists():
            table.notes.append(f"{name} is missing: no such file in the shared data folder")
            continue
        requests = read(path)
        for size in sizes:
            progress(f"{name} at {size:,}")
            started = time.process_time()
            row = {"kvd": hit_rate("kvd", requests, size)}
            times.append(_microseconds(time.process_time() - started, requests))
            row |= {policy: hit_rate(policy, requests, size) for policy in ("lru", "opt")}
            if not wanted.quick:
                row |= {policy: hit_rate(policy, requests, size) for policy in SHOWN}
            gain, possible = row["kvd"] - row["lru"], row["opt"] - row["lru"]
            score = gain / possible if possible > 0.0005 else None
            gains.append(gain)
            if size in SCORED and score is not None:
                scores.append(score)
            rates[f"{name}_{size}"] = {policy: round(rate, 4) for policy, rate in row.items()}
            table.add(
                name, f"{size:,}",
                *(f"{row[policy]:.4f}" if policy in row else "-" for policy in ("kvd", "lru", "opt", *SHOWN)),
                "-" if score is None else f"{score:+.3f}", f"{100 * gain:+.2f}", f"{times[-1]:.1f}",
            )  # fmt: skip
    page_bytes, fixed_bytes = _bytes()
    table.notes.append(
        f"{page_bytes:.0f} bytes per page in a tier of a million; {fixed_bytes / (1 << 20):.1f} MiB at first"
    )
    figures: dict[str, object] = {"bytes_per_page": round(page_bytes, 1), "rates": rates}
    ratios: dict[str, float | None] = {"mean_score": None, "worst_loss_points": None}
    if scores:
        ratios = {"mean_score": statistics.mean(scores), "worst_loss_points": max(0.0, -100 * min(gains))}
        figures["us_per_block"] = round(statistics.median(times), 2)
        table.notes.append(
            f"mean score {ratios['mean_score']:.3f} over {len(scores)} cells, at most "
            f"{ratios['worst_loss_points']:.2f} points below LRU"
        )
    finish("policy", table, wanted, ratios, figures)
    return 0 if scores else 1


def _microseconds(seconds: float, requests: list[Request]) -> float:
    return 1e6 * seconds / sum(len(request.blocks) for request in requests)


def _bytes() -> tuple[float, float]:
    """What a page adds when a tier is large, and what the smallest tier takes before any page has come."""
    taken = []
    for places in (1, 1_000_000):
        tracemalloc.start()
        policy = Policy(Worth(places))
        policy.enter(places - 1, UNKNOWN, 0.0)
        taken.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert policy.lowest() == math.inf, "it is empty"
    return taken[1] / 1_000_000, taken[0]


if __name__ == "__main__":
    sys.exit(main())
