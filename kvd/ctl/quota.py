"""`kvdctl quota`: what each tenant holds, next to what it is entitled to."""

from kvd import wire
from kvd.ctl.terminal import TIMEOUT_S, JsonOption, SocketOption, attached, reporting, show_json, show_table, size

_COLUMNS = ("tenant", "tier", "holds", "reserve", "burst", "")


def command(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Show what tenants hold, and their shares.

    In memory, on this node's disk, and in the shared tier, there of all nodes together. A tenant is what workers name
    in their plugin's settings ("tenant"). Others do not push it below its reserve; above its burst it loses pages
    first. While there is room nobody loses any. Shares are set in the settings of kvd, one section [tenants.NAME]
    each; who has none has neither reserve nor limit.

    \b
    Examples:
      kvdctl quota
      kvdctl quota --json | jq '.[] | select(.burst_bytes != null and .held_bytes > .burst_bytes)'

    \b
    Exit status: 0 kvd answered, 1 kvd refused, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json), attached(socket) as link:
        shares = link.ask(wire.GetQuotas(), wire.Quotas, TIMEOUT_S).shares
        if as_json:
            show_json(shares)
        elif not shares:
            print("No tenant holds anything, and none has a share.")
        else:
            show_table(_COLUMNS, [_row(share) for share in shares])


def _row(share: wire.TenantShare) -> tuple[object, ...]:
    above = share.burst_bytes is not None and share.held_bytes > share.burst_bytes
    return (
        share.tenant or "(none)",
        share.tier,
        size(share.held_bytes),
        size(share.reserve_bytes),
        "no limit" if share.burst_bytes is None else size(share.burst_bytes),
        "above its burst: loses pages first" if above else "",
    )
