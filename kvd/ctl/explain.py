"""`kvdctl explain`: why pages on a lower tier were, or were not, fetched."""

from typing import Annotated

import typer

from kvd import wire
from kvd.ctl.terminal import (
    TIMEOUT_S,
    JsonOption,
    SocketOption,
    attached,
    reporting,
    show_json,
    show_table,
    size,
    span,
)

_COLUMNS = ("ago", "worker", "pool", "tier", "wanted", "worth it", "tier reads", "before it", "computes", "why")

LastOption = Annotated[
    int, typer.Option("--last", min=1, max=512, help="Show at most this many decisions, the newest first.")
]


def command(last: LastOption = 20, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show why pages below memory were fetched, or not.

    A worker that looks up a prefix may find pages of it in a tier below memory. Loading them costs time on that
    tier, not loading them costs the worker the computing of their tokens; kvd fetches as many as pay, and answers
    with a shorter hit for the rest. Each line is one such decision: how many pages were wanted and how many of them
    were worth it, what that was decided from, and why. "tier reads" is what the tier was measured to bring, and how
    many tokens that is; "before it" what had been asked of it already; "computes" what the worker was measured to
    compute; "?" was never measured. The last 512 decisions are kept.

    \b
    Examples:
      kvdctl explain
      kvdctl explain --last 100
      kvdctl explain --json | jq '.decisions | map(select(.pages < .wanted)) | length'

    \b
    Exit status: 0 kvd answered, 1 kvd refused, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json), attached(socket) as link:
        made = link.ask(wire.GetDecisions(last), wire.Decisions, TIMEOUT_S)
        if as_json:
            show_json(made)
        elif made.decisions:
            print("Pages below memory are fetched where that is faster than computing their tokens again:\n")
            show_table(_COLUMNS, [_row(decision) for decision in made.decisions])
            if made.total > len(made.decisions):
                print(f"\n{len(made.decisions):,} of {made.total:,} since kvd started.")
        elif made.tiers:
            print(f"Nothing was decided yet: no worker asked for a page that only {' or '.join(made.tiers)} holds.")
        else:
            print("Nothing to decide: this kvd has no tier below memory (set nvme.path or shared.uri to have one).")


def _row(made: wire.GateDecision) -> tuple[object, ...]:
    return (
        span(made.age_s),
        f"{made.worker} (pid {made.pid})",
        made.pool,
        made.tier,
        made.wanted,
        made.pages,
        _speed(made),
        size(made.tier_bytes_queued),
        f"{made.prefill_tokens_per_s:,.0f} tokens/s" if made.prefill_tokens_per_s else "?",
        made.words,
    )


def _speed(made: wire.GateDecision) -> str:
    """In bytes, and in what "computes" is compared with."""
    if not made.tier_bytes_per_s:
        return "?"
    tokens = made.tier_bytes_per_s / made.page_bytes * made.page_tokens
    return f"{size(int(made.tier_bytes_per_s))}/s = {tokens:,.0f} tokens/s"
