"""`kvdctl evict`: pages leave, from memory and from every tier below.

Memory first, so that nothing new is written below; then the tiers; then memory again, for what came up meanwhile.
"""

import sys
from typing import Annotated

import msgspec
import typer

from kvd import wire
from kvd.client import Link
from kvd.ctl.naming import NamespaceOption, is_whole, namespace_of, pages_named
from kvd.ctl.terminal import (
    FINE,
    TIMEOUT_S,
    WRONG,
    JsonOption,
    SocketOption,
    attached,
    reporting,
    show_json,
)
from kvd.errors import KvdError

_BELOW_TIMEOUT_S = 310.0  # a little longer than kvd waits for a tier
_MOST_ROUNDS = 3  # workers may read pages back up, and write them down again, while we look

KeyArgument = Annotated[
    str | None, typer.Argument(metavar="KEY", help="A page's key as kvdctl ls shows it, or the beginning of it.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Every page of every model.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


class Outcome(msgspec.Struct):
    """What left, in pages. `held` stayed in memory because somebody uses them."""

    ram: int = 0
    held: int = 0
    tiers: list[wire.TierRemoval] = []


def command(
    key: KeyArgument = None, namespace: NamespaceOption = None, everything: AllOption = False, yes: YesOption = False,
    socket: SocketOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Evict a page and all that follow it, or a namespace.

    They leave memory and every tier below, for good: they are not there after a restart either. What a worker reads
    at this moment stays in memory, and so do the pages before it; how many is said. Of a shared tier they leave for
    all nodes, whose own memory and disks keep what they have. A page that only a lower tier holds is named by its
    whole key. Workers compute evicted pages again when they need them, and store them again.

    \b
    Examples:
      kvdctl evict 3fa94c01d2e8
      kvdctl evict --namespace 5d41402abc4b2a76b9719d911017c592 --yes
      kvdctl evict --all --yes --json

    \b
    Exit status: 0 all of it left, 1 something stayed or nothing was there, 2 wrong usage, 3 no daemon reachable.
    """
    if everything == (key is not None or namespace is not None):
        raise typer.BadParameter("give a KEY, --namespace, or --all")
    with reporting(as_json), attached(socket) as link:
        digest = namespace_of(namespace)
        whole = b""
        if key is not None:
            found = pages_named(link, key, digest)
            if not found and not is_whole(key):
                hint = "see kvdctl ls; a page that only a lower tier holds needs its whole key"
                raise KvdError(f"no page in memory has a key that begins with {key}", hint)
            whole = found[0].key if found else bytes.fromhex(key)
        lower = [tier.name for tier in link.ask(wire.GetStatus(), wire.Status, TIMEOUT_S).tiers[1:]]
        if not yes:
            _confirm(whole, digest, lower)
        outcome = evict(link, digest, whole, everything)
        if as_json:
            show_json(outcome)
        else:
            _show(outcome)
        if not outcome.ram and not outcome.held and not any(tier.pages or tier.trouble for tier in outcome.tiers):
            raise KvdError("no such page is held", "see kvdctl ls")
        raise typer.Exit(WRONG if outcome.held or any(tier.trouble for tier in outcome.tiers) else FINE)


def evict(link: Link, namespace: bytes, key: bytes, everything: bool) -> Outcome:
    """Raises KvdError when the daemon goes away or refuses."""
    outcome = Outcome()
    outcome.ram, outcome.held = _from_ram(link, namespace, key, everything)
    removed: dict[str, wire.TierRemoval] = {}
    for _ in range(_MOST_ROUNDS):
        request = wire.RemoveBelow(namespace, key, everything)
        for tier in link.ask(request, wire.RemovedBelow, _BELOW_TIMEOUT_S).tiers:
            before = removed[tier.tier].pages if tier.tier in removed else 0
            removed[tier.tier] = wire.TierRemoval(tier.tier, before + tier.pages, tier.trouble)
        again, outcome.held = _from_ram(link, namespace, key, everything)
        outcome.ram += again
        if not again or not removed:
            break
    outcome.tiers = list(removed.values())
    return outcome


def _from_ram(link: Link, namespace: bytes, key: bytes, everything: bool) -> tuple[int, int]:
    """(evicted, held). Rounds over all pages until one evicts nothing, unless workers store as fast."""
    evicted, held = 0, 0
    for _ in range(_MOST_ROUNDS):
        cursor, this_round, held = 0, 0, 0
        while cursor >= 0:
            part = link.ask(wire.EvictPages(namespace, key, everything, cursor), wire.Evicted, TIMEOUT_S)
            cursor, this_round, held = part.next, this_round + part.pages, held + part.held
        evicted += this_round
        if not this_round:
            break
    return evicted, held


def _confirm(key: bytes, namespace: bytes, lower: list[str]) -> None:
    what = f"page {key.hex()} and all that follow it" if key else "all pages"
    where = f" of namespace {namespace.hex()}" if namespace else ""
    tiers = ["memory", *(f"{name} (for all nodes)" if name == "shared" else name for name in lower)]
    if not sys.stdin.isatty():
        raise KvdError(f"would evict {what}{where} from {', '.join(tiers)}", "say --yes to do it without being asked")
    typer.confirm(f"Evict {what}{where} from {', '.join(tiers)}?", abort=True)


def _show(outcome: Outcome) -> None:
    print(f"memory: {outcome.ram:,} pages evicted")
    for tier in outcome.tiers:
        print(f"{tier.tier}: {tier.pages:,} pages removed")
        if tier.trouble:
            print(f"{tier.tier}: NOT all: {tier.trouble}. What it still holds may come back: run this again.")
    if outcome.held:
        print(f"{outcome.held:,} pages stayed in memory: somebody reads them. Run this again in a moment.")
