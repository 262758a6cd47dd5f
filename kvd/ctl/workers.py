"""`kvdctl workers`: who is attached, and whether it uses the cache."""

from kvd import wire
from kvd.ctl.terminal import (
    TIMEOUT_S,
    JsonOption,
    SocketOption,
    attached,
    reporting,
    show_json,
    show_table,
    span,
)

_COLUMNS = ("pid", "worker", "shard", "pools", "attached", "circuit", "pages read", "pages written", "leases")


def command(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show the attached workers, rank by rank.

    A circuit is closed while kvd answers that worker in time. While it is open the worker computes everything
    itself; "off" means that the plugin found a reason not to cache this worker at all. The JSON has all counters
    of the plugin, among them every kind of miss.

    \b
    Examples:
      kvdctl workers
      kvdctl workers --json | jq '.[] | select(.circuit != "closed")'

    \b
    Exit status: 0 kvd answered, 1 kvd refused, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json), attached(socket) as link:
        workers = link.ask(wire.GetStatus(), wire.Status, TIMEOUT_S).workers
        if as_json:
            show_json(workers)
        elif workers:
            show_table(_COLUMNS, [_row(worker) for worker in workers])
        else:
            print("No worker is attached.")


def _row(worker: wire.WorkerStatus) -> tuple[object, ...]:
    return (
        str(worker.pid),
        worker.label,
        worker.shard or "-",
        " ".join(worker.pools) or "-",
        span(worker.attached_s),
        worker.circuit,
        worker.counters.get("get_pages", 0),
        worker.counters.get("set_pages", 0),
        worker.leases + worker.reservations,
    )
