"""`kvdctl ls`: which prefixes the node holds."""

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

_COLUMNS = ("key", "pages", "tokens", "bytes", "idle", "leased", "model and pool")
_KEY_HEAD = 12  # characters that tell keys apart on a screen

LimitOption = Annotated[
    int, typer.Option("--limit", min=1, max=100_000, help="Show at most this many, most recently used first.")
]


def command(limit: LimitOption = 100, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """List the prefixes that kvd holds.

    Each is a chain of pages, named by the key of its deepest one. Prefixes that begin alike share their first
    pages, so the sizes may add up to more than the arena holds. The table shows the head of each key, the JSON all
    of it. Tokens are 0 where no worker of that model has attached since kvd started.

    \b
    Examples:
      kvdctl ls
      kvdctl ls --limit 10
      kvdctl ls --json | jq '.prefixes | map(.tokens) | max'

    \b
    Exit status: 0 kvd answered, 1 kvd refused, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json), attached(socket) as link:
        found = link.ask(wire.GetPrefixes(limit), wire.Prefixes, TIMEOUT_S)
        if as_json:
            show_json(found)
            return
        if not found.prefixes:
            print("No prefix is held.")
            return
        show_table(_COLUMNS, [_row(prefix) for prefix in found.prefixes])
        if found.total > len(found.prefixes):
            print(f"{len(found.prefixes):,} of {found.total:,} prefixes; --limit shows more.")


def _row(prefix: wire.Prefix) -> tuple[object, ...]:
    return (
        prefix.key[:_KEY_HEAD],
        prefix.pages,
        prefix.tokens,
        size(prefix.bytes),
        span(prefix.idle_s),
        "leased" if prefix.leased else "",
        prefix.label,
    )
