"""`kvdctl status`: the daemon at a glance."""

from collections.abc import Iterator

from kvd import wire
from kvd.ctl.terminal import (
    TIMEOUT_S,
    JsonOption,
    SocketOption,
    attached,
    percent,
    reporting,
    show_facts,
    show_json,
    size,
    span,
)


def command(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show the daemon at a glance.

    Memory, hits, workers, what the daemon counted since it started, and what it warns of.

    \b
    Examples:
      kvdctl status
      kvdctl status --json | jq .counters
      kvdctl status --socket /run/kvd/kvd.sock

    \b
    Exit status: 0 kvd answered, 1 kvd refused, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json), attached(socket) as link:
        found = link.ask(wire.GetStatus(), wire.Status, TIMEOUT_S)
        if as_json:
            show_json(found)
        else:
            show_facts(_facts(found))


def _facts(status: wire.Status) -> Iterator[tuple[str, str]]:
    yield "kvd", f"{status.version} at {status.socket}, pid {status.pid}, up {span(status.uptime_s)}"
    yield "arena", f"{status.arena}; {status.warm_pages} pages taken over at start"
    for tier in status.tiers:
        used = (
            f"{size(tier.bytes_used)} of {size(tier.bytes_total)} used ({percent(tier.bytes_used, tier.bytes_total)})"
        )
        extents = f", {tier.free_extents} of {tier.extents} extents free" if tier.extents else ""
        yield tier.name, f"{tier.pages:,} pages, {used}{extents}"
        if tier.trouble:
            yield f"{tier.name} trouble", f"{tier.trouble}: see kvdctl doctor"
        asked = tier.hits + tier.misses
        hits = f"{percent(tier.hits, asked)} of {asked:,} pages asked for" if asked else "nothing was asked for yet"
        yield f"{tier.name} hits", f"{hits}; {tier.evicted:,} evicted"
    broken = sum(worker.circuit != "closed" for worker in status.workers)
    note = f", {broken} of them without a closed circuit: see kvdctl doctor" if broken else ""
    yield "workers", f"{len(status.workers)} attached{note}"
    memlock = "unlimited" if status.memlock_bytes < 0 else size(status.memlock_bytes)
    yield "process", f"{size(status.rss_bytes)} resident, memlock limit {memlock}"
    yield "gpus", ", ".join(status.gpus) or "none"
    counters = ", ".join(f"{name} {count:,}" for name, count in sorted(status.counters.items()) if count)
    yield "counters", counters or "all zero"
    for warning in status.warnings:
        yield "warning", warning
