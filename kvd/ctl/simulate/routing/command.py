"""`kvdctl simulate routing`: what a fleet would have done for a trace, by routing policy. Asks nobody."""

from random import Random
from typing import Annotated

import typer

from kvd.ctl.simulate.options import TraceOption, names
from kvd.ctl.simulate.routing.engine import ENGINES
from kvd.ctl.simulate.routing.fleet import POLICIES
from kvd.ctl.simulate.routing.measure import Figures, measure
from kvd.ctl.simulate.traces import prompts
from kvd.ctl.terminal import JsonOption, reporting, show_json, show_table

_COLUMNS = (
    "policy", "TTFT s: mean", "p50", "p90", "p99", "ITL s: mean", "p50", "p90", "p99", "block hits", "imbalance",
)  # fmt: skip
_POLICY = "kvd,random"

WorkersOption = Annotated[int, typer.Option("--workers", min=1, max=512, help="How many, all alike.")]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy", help=f"Any of {', '.join(POLICIES)}, with commas. By default {_POLICY}.", show_default=False
    ),
]
CompareOption = Annotated[bool, typer.Option("--compare", help="All policies.")]
LoadOption = Annotated[
    float, typer.Option("--load", min=0.01, max=10.0, help="How fast requests come, by what the fleet can do at best.")
]
RequestsOption = Annotated[
    int | None, typer.Option("--requests", min=1, help="Only the trace's first ones.", show_default=False)
]
SeedOption = Annotated[
    int, typer.Option("--seed", help="For policies that draw lots. The same seed, the same figures.")
]


def command(
    trace: TraceOption,
    workers: WorkersOption = 8,
    policy: PolicyOption = None,
    compare: CompareOption = False,
    load: LoadOption = 0.9,
    requests: RequestsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare routing policies on a trace, by time to first token and between tokens.

    Every policy routes the same requests, with the router's own code, to modelled SGLang workers in virtual time:
    chunked prefill before decode, continuous batching, an LRU prefix cache in KV memory and no tier below it. What
    their steps take was fitted to measurements of Qwen3-32B on four H100 each (5 % mean error).

    The trace's timestamps are scaled to the load. A load of 1.0 is what the fleet could do if every worker had all
    the others' caches: no policy gets quite there. Times are in seconds. Imbalance is how many prompt tokens the
    busiest worker computed, by the mean.

    \b
    Examples:
      kvdctl simulate routing --trace conversation_trace.jsonl --workers 8 --load 0.7
      kvdctl simulate routing --trace trace.jsonl.gz --workers 16 --compare
      kvdctl simulate routing --trace trace.jsonl --compare --json | jq 'map_values(.ttft_s.mean)'

    \b
    Exit status: 0 done, 1 the trace cannot be read, contradicts itself or has too long prompts, 2 wrong usage.
    """
    if compare and policy is not None:
        raise typer.BadParameter("give policies, or --compare for all of them", param_hint="--policy")
    chosen = list(POLICIES) if compare else names(_POLICY if policy is None else policy, POLICIES, "--policy")
    with reporting(as_json):
        replayed = prompts(trace, requests)
        engine = next(iter(ENGINES.values()))
        found = {name: measure(engine, replayed, workers, name, load, Random(seed).random) for name in chosen}
        if as_json:
            show_json({name: _document(figures) for name, figures in found.items()})
        else:
            show_table(_COLUMNS, [_row(name, figures) for name, figures in found.items()])


def _document(figures: Figures) -> dict[str, object]:
    return figures._asdict() | {"ttft_s": figures.ttft_s._asdict(), "itl_s": figures.itl_s._asdict()}


def _row(name: str, figures: Figures) -> tuple[str, ...]:
    return (
        name,
        *(f"{seconds:.3f}" for seconds in figures.ttft_s),
        *(f"{seconds:.4f}" for seconds in figures.itl_s),
        f"{figures.block_hit_rate:.3f}",
        f"{figures.imbalance:.2f}",
    )
