"""`kvdctl tiers`: how full each tier is, and what it is good for."""

from kvd import wire
from kvd.ctl.terminal import (
    TIMEOUT_S,
    JsonOption,
    SocketOption,
    attached,
    percent,
    reporting,
    show_json,
    show_table,
    size,
)

_COLUMNS = ("tier", "used", "total", "full", "pages", "hits", "misses", "hit rate", "evicted", "free extents", "state")


def command(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show how full and how useful each tier is.

    An extent is the unit of memory that one page size gets at a time. Hits and misses count pages, since kvd
    started.

    \b
    Examples:
      kvdctl tiers
      kvdctl tiers --json | jq '.[] | {name, pages}'

    \b
    Exit status: 0 kvd answered, 1 kvd refused, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json), attached(socket) as link:
        tiers = link.ask(wire.GetStatus(), wire.Status, TIMEOUT_S).tiers
        if as_json:
            show_json(tiers)
        else:
            show_table(_COLUMNS, [_row(tier) for tier in tiers])


def _row(tier: wire.TierStatus) -> tuple[object, ...]:
    return (
        tier.name,
        size(tier.bytes_used),
        size(tier.bytes_total),
        percent(tier.bytes_used, tier.bytes_total),
        tier.pages,
        tier.hits,
        tier.misses,
        percent(tier.hits, tier.hits + tier.misses),
        tier.evicted,
        f"{tier.free_extents} of {tier.extents}" if tier.extents else "",
        tier.trouble or "works",
    )
