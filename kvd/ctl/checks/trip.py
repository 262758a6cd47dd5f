"""Does a page make the whole way: set, lookup, get, and come back with the same bytes?

Attaches as a worker would, with a scratch namespace: its pages leave with the session, however this process ends.
When the arena has no free extent, the page takes the size of one that is there, so that making room for it costs
the oldest page of that size and not an extent full of them.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from kvd import wire
from kvd.client import Channel, Channels, Link
from kvd.ctl.checks.finding import Finding
from kvd.errors import KvdError
from kvd.index import Name
from kvd.leasetable import LeaseTable
from kvd.pages import KEY_BYTES, NAMESPACE_BYTES

CHECK = "page trip"
LABEL = "kvdctl doctor"
_PAGE_BYTES = 256 << 10
_TIMEOUT_S = 1.0
_TTL_S = 5.0
_BEFORE = ("attach_us", "join_us", "connect_us")  # a worker does these once


class TripFailed(Exception):
    """The page did not come back right."""


class _NoRoom(Exception):
    """Nothing can be stored now."""


class _Steps:
    """Where we are, and how long each step took."""

    def __init__(self) -> None:
        self.now = "start"
        self.taken_us: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.now = name
        started = time.perf_counter()
        yield
        self.taken_us[f"{name.replace(' ', '_')}_us"] = round((time.perf_counter() - started) * 1e6)


def trip(path: Path, status: wire.Status) -> list[Finding]:
    """Send one page through the running daemon."""
    steps = _Steps()
    try:
        length = _travel(path, status.tiers[0].free_extents == 0, steps)
    except _NoRoom:
        message = "kvd has no room for one page, and nothing in it may be evicted"
        return [Finding(CHECK, "yellow", message, "raise arena.size_bytes, or lower the workers' leases (promise_s)")]
    except TripFailed as error:
        remedy = "stop using this kvd: drain it, look at dmesg for memory errors, restart it and report this"
        return [Finding(CHECK, "red", f"failed at step '{steps.now}': {error}", remedy)]
    except KvdError as error:
        remedy = error.hint or "look at `journalctl -u kvd` and `systemctl status kvd`; restart it if it stays so"
        return [Finding(CHECK, "red", f"failed at step '{steps.now}': {error.message}", remedy)]
    moved = {name: taken for name, taken in steps.taken_us.items() if name not in _BEFORE}
    shown = ", ".join(f"{name.removesuffix('_us').replace('_', ' ')} {taken}" for name, taken in moved.items())
    total = sum(moved.values())
    message = f"{length >> 10} KiB were stored and read back, the same, in {total} us ({shown})"
    return [Finding(CHECK, "green", message, figures={"page_bytes": length, "total_us": total, **steps.taken_us})]


def _travel(path: Path, arena_is_cut_up: bool, steps: _Steps) -> int:
    leases = LeaseTable()
    try:
        with steps("attach"):
            link = Link(path, "worker", LABEL, leases.fd, _TIMEOUT_S)
        channels = Channels(link.welcome)
        try:
            with steps("join"):
                length = _usual_length(link) if arena_is_cut_up else _PAGE_BYTES
                spec = wire.NamespaceSpec(
                    os.urandom(NAMESPACE_BYTES), length, 1, 0, 1, "doctor", LABEL, scratch=True
                )  # fmt: skip
                link.ask(wire.Join([spec]), wire.Joined, _TIMEOUT_S)
            with channels.lend() as channel:
                key, data = os.urandom(KEY_BYTES), os.urandom(length)
                with steps("connect"):
                    channel.ask(lambda n: wire.Lookup(n, 0, key, _TTL_S), wire.Found, _TIMEOUT_S)
                _set(link, channel, key, data, steps)
                _get(link, channel, leases, spec, key, data, steps)
        finally:
            link.close()
            channels.close()
    finally:
        leases.close()
    return length


def _usual_length(link: Link) -> int:
    """The size of a page that is there."""
    scanned = link.ask(wire.Scan(0, 1), wire.Scanned, _TIMEOUT_S)
    if not scanned.lease:
        return _PAGE_BYTES
    link.send(wire.EndScan(scanned.lease))
    length: int = wire.SCANNED_ROW.unpack_from(scanned.rows)[2]
    return length or _PAGE_BYTES


def _set(link: Link, channel: Channel, key: bytes, data: bytes, steps: _Steps) -> None:
    with steps("reserve"):
        reserved = channel.ask(lambda n: wire.ReservePages(n, 0, key, _TTL_S), wire.Reserved, _TIMEOUT_S)
        offset, generation, verdict = wire.RESERVED_ROW.unpack(reserved.rows)
    if verdict != wire.WRITE:
        raise _NoRoom
    with steps("write"):
        link.arena[offset : offset + len(data)] = data
        checksum = xxhash.xxh3_128_digest(data)
    with steps("commit"):
        row = wire.COMMIT_ROW.pack(offset, generation, checksum)
        done = channel.ask(lambda n: wire.CommitPages(n, reserved.reservation, row), wire.Committed, _TIMEOUT_S)
        if done.pages != 1:
            raise TripFailed("kvd did not take the page")


def _get(
    link: Link, channel: Channel, leases: LeaseTable, spec: wire.NamespaceSpec, key: bytes, data: bytes, steps: _Steps
) -> None:
    with steps("look up"):
        match = link.index.leading(Name.of(spec.digest), [key.hex()])
        if match.pages != 1 or leases.hold(match.tips, time.monotonic(), _TTL_S) is None:
            raise TripFailed("the shared index does not show the page that was just stored")
    with steps("lease"):
        leased = channel.ask(lambda n: wire.LeasePages(n, 0, key, _TTL_S), wire.Leased, _TIMEOUT_S)
        offset, _, length, checksum = wire.LEASED_ROW.unpack(leased.rows)
        if length != len(data):
            raise TripFailed("kvd does not have the page that was just stored")
    with steps("read"):
        arrived = link.arena[offset : offset + length]
        if xxhash.xxh3_128_digest(arrived) != checksum or arrived != data:
            raise TripFailed("other bytes came back than were stored")
    with steps("release"):
        channel.tell(wire.ReleaseLease(leased.lease))
        # Answered only after the release was taken: nothing of ours is under way when we hang up.
        channel.ask(lambda n: wire.Lookup(n, 0, key, _TTL_S), wire.Found, _TIMEOUT_S)
