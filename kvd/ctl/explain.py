"""`kvdctl explain`: why a request went where it went; without one, why pages on a lower tier were fetched or not."""

from typing import Annotated

import typer

from kvd import wire
from kvd.ctl.router import requests
from kvd.ctl.router.link import DEFAULT_URL, KeyFileOption, RouterOption, router_at
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

RequestArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="REQUEST-ID",
        help="A request that went through the router: the x-kvd-request-id of its answer.",
        show_default=False,
    ),
]
RequestsOption = Annotated[
    bool, typer.Option("--requests", help="List the last requests that the router sent to workers, with their ids.")
]
LastOption = Annotated[
    int, typer.Option("--last", min=1, max=512, help="Show at most this many decisions, the newest first.")
]


def command(
    request: RequestArgument = None,
    list_requests: RequestsOption = False,
    last: LastOption = 20,
    router: RouterOption = DEFAULT_URL,
    key_file: KeyFileOption = None,
    socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show why: where a request went, or what kvd fetched for it.

    With the id of a request, the router is asked: which worker it was sent to, why that one and not another, what
    each candidate had of the prompt and what it would have cost there, when its first token was expected and when it
    came, and how much of the prompt was cached as the engine says. Costs are seconds of somebody's waiting, where
    the policy knows them; the columns after "first token" are what a cost is made of. The router remembers the last
    1024 decisions, and lists the best 32 candidates of each. --requests lists what it sent lately (100 at most).

    Without an id, this node's kvd is asked about its tiers. A worker that looks up a prefix may find pages of it in a
    tier below memory. Loading them costs time on that tier, not loading them costs the worker the computing of their
    tokens; kvd fetches as many as pay, and answers with a shorter hit for the rest. Each line is one such decision:
    how many pages were wanted and how many of them were worth it, what that was decided from, and why. "tier reads"
    is what the tier was measured to bring, and how many tokens that is; "before it" what had been asked of it
    already; "computes" what the worker was measured to compute; "?" was never measured. The last 512 are kept.

    \b
    Examples:
      kvdctl explain 3f9c01d2aa7b-1c
      kvdctl explain --requests --last 50
      kvdctl explain
      kvdctl explain --json | jq '.decisions | map(select(.pages < .wanted)) | length'

    \b
    Exit status: 0 kvd or the router answered, 1 it refused or knows no such request, 2 wrong usage,
    3 no daemon reachable, or no router.
    """
    if request is not None and list_requests:
        raise typer.BadParameter("give an id, or --requests", param_hint="--requests")
    with reporting(as_json):
        if request is not None:
            requests.explain(router_at(router, key_file), request, as_json)
        elif list_requests:
            requests.last(router_at(router, key_file), last, as_json)
        else:
            _fetched(last, socket, as_json)


def _fetched(last: int, socket: SocketOption, as_json: bool) -> None:
    with attached(socket) as link:
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
