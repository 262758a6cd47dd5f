"""`kvdctl simulate`: what a tier, or a fleet, would have done for a trace. Asks no daemon."""

from pathlib import Path
from typing import Annotated

import typer

from kvd.ctl.simulate.cache import NAMES, hit_rate
from kvd.ctl.simulate.options import TraceOption, names
from kvd.ctl.simulate.plot import Rates, draw
from kvd.ctl.simulate.routing.command import command as routing
from kvd.ctl.simulate.traces import Request, read
from kvd.ctl.terminal import JsonOption, reporting, show_json, show_table

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

CapacityOption = Annotated[str, typer.Option("--capacity", help="Sizes of the tier in blocks, with commas.")]
PolicyOption = Annotated[str, typer.Option("--policy", help=f"Any of {', '.join(NAMES)}, with commas.")]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Also draw it: .html, or .png where matplotlib is installed."),
]


@app.callback()
def simulate() -> None:
    """Replay a recorded workload. Asks no daemon."""


@app.command("cache")
def cache(
    trace: TraceOption,
    capacity: CapacityOption = "1000,5000",
    policy: PolicyOption = "kvd,lru,opt",
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare cache policies on a trace, by block hit rate.

    kvd is the policy that the daemon uses, with its rule that a page stays as long as a page below it does. opt
    knows the future: no policy can do better. All blocks count alike, and time is the trace's own.

    \b
    Examples:
      kvdctl simulate cache --trace conversation_trace.jsonl
      kvdctl simulate cache --trace trace.jsonl.gz --capacity 1000,5000,10000 --policy kvd,lru,opt --plot rates.html
      kvdctl simulate cache --trace trace.jsonl --json | jq '.kvd."1000"'

    \b
    Exit status: 0 done, 1 the trace cannot be read or the plot not be written, 2 wrong usage.
    """
    capacities, policies = _capacities(capacity), names(policy, NAMES, "--policy")
    with reporting(as_json):
        rates = _rates(read(trace), capacities, policies)
        if plot is not None:
            draw(plot, rates, trace.name)
        if as_json:
            show_json({name: {str(places): rate for places, rate in row.items()} for name, row in rates.items()})
        else:
            columns = ("policy", *(f"{places:,}" for places in capacities))
            show_table(columns, [(name, *(f"{rate:.4f}" for rate in row.values())) for name, row in rates.items()])


app.command("routing")(routing)


def _rates(requests: list[Request], capacities: list[int], policies: list[str]) -> Rates:
    return {name: {places: hit_rate(name, requests, places) for places in capacities} for name in policies}


def _capacities(words: str) -> list[int]:
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise typer.BadParameter(f"{words!r} is not a list of block counts such as 1000,5000", param_hint="--capacity")
    return list(dict.fromkeys(found))
