"""`kvdctl verify`: is every page still what was stored?

Walks the arena in leased batches and checks each page's bytes in this process, so that the daemon's loop is not
held up. A page that fails is reported with the end of its batch, and the daemon quarantines it: it is never
served again.

Always true: a page counts as damaged only if its lease covered the whole time of reading it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import typer
import xxhash

from kvd import wire
from kvd.client import Link
from kvd.ctl.terminal import (
    FINE,
    TIMEOUT_S,
    WRONG,
    JsonOption,
    SocketOption,
    attached,
    reporting,
    show_json,
    size,
)
from kvd.errors import KvdError

_BATCH = 64  # pages
_BATCH_BUDGET_S = 20.0  # the daemon leases a batch for 30 s
_CHECK_TIMEOUT_S = 60.0  # for one part of the daemon's bookkeeping

Progress = Callable[[int], None]  # told how many pages are done


class BadPage(msgspec.Struct, frozen=True):
    """A page that is not what was stored. `what` is "payload" or "header"."""

    namespace: str
    key: str
    offset: int
    what: str


class Verdict(msgspec.Struct):
    """What a walk saw. `shards` are the parts of pages, one per rank; `faults` are broken invariants of kvd's own."""

    pages: int = 0
    shards: int = 0
    bytes: int = 0
    seconds: float = 0.0
    bad: list[BadPage] = []
    faults: list[str] = []


def command(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Check every page against its checksum.

    Then lets kvd check its own bookkeeping. Runs beside the workers: a batch of pages at a time is protected from
    eviction, nothing else changes. A damaged page is quarantined (never served again, workers recompute it), so a
    second run is clean unless memory goes on failing. Pages stored while it runs may not be visited.

    \b
    Examples:
      kvdctl verify
      kvdctl verify --json | jq '.bad | length'

    \b
    Exit status: 0 all is right, 1 something was wrong, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json), attached(socket) as link:
        started = time.monotonic()
        with _progress(link, as_json) as progress:
            verdict = walk(link, progress)
        verdict.faults = bookkeeping(link)
        verdict.seconds = round(time.monotonic() - started, 3)
        if as_json:
            show_json(verdict)
        else:
            _show(verdict)
        raise typer.Exit(WRONG if verdict.bad or verdict.faults else FINE)


def walk(link: Link, progress: Progress) -> Verdict:
    """Visit every page held. Raises KvdError when the daemon goes away."""
    verdict = Verdict()
    cursor, limit = 0, _BATCH
    while cursor >= 0:
        deadline = time.monotonic() + _BATCH_BUDGET_S
        scanned = link.ask(wire.Scan(cursor, limit), wire.Scanned, TIMEOUT_S)
        rows = list(wire.SCANNED_ROW.iter_unpack(scanned.rows))
        damaged = _read(link, rows, deadline)
        if scanned.lease:
            link.send(wire.EndScan(scanned.lease, sorted(damaged or ())))
        if damaged is None:  # too slow, or this process was stopped for a while: again, with less at a time
            if limit == 1:
                raise KvdError(
                    f"one page takes longer than {_BATCH_BUDGET_S:.0f} s to read", "is the node out of CPU?"
                )
            limit = max(1, limit // 8)
            continue
        cursor = scanned.next
        verdict.pages += len({(namespace, key) for *_, namespace, key in rows})
        verdict.shards += len(rows)
        verdict.bytes += sum(row[2] for row in rows)
        verdict.bad += [BadPage(rows[n][4].hex(), rows[n][5].hex(), rows[n][0], damaged[n]) for n in damaged]
        progress(verdict.pages)
    return verdict


def bookkeeping(link: Link) -> list[str]:
    """Let kvd check its own invariants, a part at a time; what is broken, in words."""
    found: list[str] = []
    cursor = 0
    while cursor >= 0:
        part = link.ask(wire.Check(cursor), wire.Checked, _CHECK_TIMEOUT_S)
        found += part.faults
        cursor = part.next
    return found


def _read(link: Link, rows: list[tuple[int, int, int, bytes, bytes, bytes]], deadline: float) -> dict[int, str] | None:
    """What is wrong with which row; None when the deadline passed, and with it the promise of the lease."""
    damaged: dict[int, str] = {}
    with memoryview(link.arena) as arena:
        for number, (offset, _, length, checksum, _, _) in enumerate(rows):
            if not 0 < length <= len(arena) - offset:
                damaged[number] = "header"
            elif xxhash.xxh3_128_digest(arena[offset : offset + length]) != checksum:
                damaged[number] = "payload"
            if time.monotonic() >= deadline:
                return None
    return damaged


def _show(verdict: Verdict) -> None:
    rate = f", {size(int(verdict.bytes / verdict.seconds))}/s" if verdict.seconds and verdict.bytes else ""
    print(f"{verdict.pages:,} pages, {size(verdict.bytes)} read in {verdict.seconds:.2f} s{rate}")
    for page in verdict.bad:
        print(
            f"damaged {page.what}: page {page.key} of namespace {page.namespace}, at byte {page.offset}: quarantined"
        )
    for fault in verdict.faults:
        print(f"kvd's bookkeeping: {fault}")
    if verdict.bad:
        print("Run it again: if more turn up, the memory of this node is failing (look for ECC errors in dmesg).")
    if verdict.faults:
        print("This is a bug of kvd: please report it. Restarting kvd rebuilds its bookkeeping from the pages.")
    if not verdict.bad and not verdict.faults:
        print("All is right.")


@contextmanager
def _progress(link: Link, as_json: bool) -> Iterator[Progress]:
    """A bar on a terminal, silence elsewhere."""
    if as_json or not sys.stderr.isatty():
        yield lambda pages: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    total = sum(tier.pages for tier in link.ask(wire.GetStatus(), wire.Status, TIMEOUT_S).tiers)
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking pages", total=total)
        yield lambda pages: bar.update(task, completed=pages)
