"""What operators see: status, prefixes held, scans for `kvdctl verify`. Reads the node; changes only leases."""

import os
import resource
from collections.abc import Iterable, Sequence

import psutil

from kvd import __version__, wire
from kvd.daemon.below import Below
from kvd.daemon.group import Group
from kvd.daemon.node import Node
from kvd.daemon.promotion import Lower
from kvd.daemon.room import Room
from kvd.daemon.sessions import Session
from kvd.daemon.writeback import WriteBack
from kvd.places import SOCKET
from kvd.settings import DaemonSettings


def status(
    node: Node,
    settings: DaemonSettings,
    room: Room,
    now: float,
    started: float,
    prefaulted: int,
    strangers: int,
    lower: Sequence[Below],
    shortage: str,
    gpus: list[str],
) -> wire.Status:
    """The daemon at a glance."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    counters = dict(node.counters)
    counters["messages_from_strangers"] = strangers
    tier = wire.TierStatus(
        "ram",
        node.arena.extents * node.arena.extent_bytes,
        node.arena.used_bytes,
        len(node.residency),
        counters.get("ram_hits", 0),
        counters.get("ram_misses", 0),
        counters.get("ram_evicted", 0),
        node.arena.free_extents,
        node.arena.extents,
        prefaulted,
    )
    return wire.Status(
        version=__version__,
        epoch=room.epoch,
        pid=os.getpid(),
        uptime_s=now - started,
        socket=str(settings.run_dir / SOCKET),
        arena=f"{room.memory.name}, {'parked with systemd' if room.parked else 'kept by name'}",
        warm_pages=node.warm_pages,
        tiers=[tier, *(_below(b, w, c) for b, w, c in zip(lower, node.writebacks, node.promotion.tiers, strict=True))],
        workers=[_worker(node, s, now) for s in node.sessions.all() if s.role == "worker"],
        counters=counters,
        rss_bytes=_rss_bytes(),
        memlock_bytes=-1 if soft == resource.RLIM_INFINITY else soft,
        gpus=gpus,
        warnings=[*_warnings(settings, tier.bytes_total, soft), *([shortage] if shortage else [])],
    )


def _rss_bytes() -> int:
    try:
        return int(psutil.Process().memory_info().rss)
    except OSError:  # no descriptor is left to look with
        return 0


def _below(below: Below, writeback: WriteBack, source: Lower) -> wire.TierStatus:
    gauge = below.gauge
    counters = {
        **gauge.counters, "restarts": below.restarts, "waiting_to_be_written": len(writeback),
        "loads_bytes_per_s": int(source.disk.bytes_per_s), "loads_latency_us": int(1e6 * source.disk.latency_s),
        "bytes_on_the_way": source.disk.on_the_way,
    }  # fmt: skip
    return wire.TierStatus(
        below.name, gauge.bytes_total, gauge.bytes_used, gauge.pages, source.came, source.failed,
        gauge.counters.get("evicted", 0), 0, 0, 0, below.trouble, counters,
    )  # fmt: skip


def _warnings(settings: DaemonSettings, arena_bytes: int, memlock: int) -> list[str]:
    found: list[str] = []
    if settings.arena.lock and memlock not in (-1, resource.RLIM_INFINITY) and memlock < arena_bytes:
        # It was high enough when kvd started, or it would not run.
        found.append("the memlock limit was lowered below the arena's size: kvd will not start again")
    return found


def _worker(node: Node, session: Session, now: float) -> wire.WorkerStatus:
    leases, reservations = node.leases.counts(session.id)
    if session.table is not None:
        leases += len(session.table.live(now))
    shards = sorted({f"{spec.shard + 1}/{spec.shards}" for spec in session.namespaces})
    return wire.WorkerStatus(
        session.id, session.pid, session.label, now - session.since, [s.pool for s in session.namespaces],
        " ".join(shards), session.circuit, leases, reservations, session.counters,
    )  # fmt: skip


def prefixes(node: Node, limit: int, now: float) -> wire.Prefixes:
    """The chains held, most recently used first."""
    tips, total = node.residency.tips(max(0, limit))
    held = node.sessions.held_places(now)
    return wire.Prefixes([_prefix(node, group, now, group.place in held) for group in tips], total)


def _prefix(node: Node, group: Group, now: float, leased: bool) -> wire.Prefix:
    spec = node.labels.get(group.namespace)
    pages = group.depth + 1
    return wire.Prefix(
        namespace=group.namespace.hex(),
        label=f"{spec.label} {spec.pool}" if spec else "(no worker of this model since the restart)",
        key=group.key.hex(),
        pages=pages,
        tokens=pages * spec.page_tokens if spec else 0,
        bytes=pages * group.length * len(group.slots),
        idle_s=now - group.last_use,
        leased=leased or group.leases > 0,
    )


def scan(node: Node, session: Session, cursor: int, limit: int, now: float, ttl_s: float) -> wire.Scanned:
    """Lease the next groups by id, one row per shard; a row's position maps to its group in `kvdctl verify`."""
    groups: list[Group] = []
    at = cursor
    while at <= node.residency.last_id and len(groups) < limit:
        group = node.residency.by_id(at)
        if group is not None:
            groups.append(group)
        at += 1
    rows = list(_rows(node, groups))
    leased = tuple(group for group, _ in rows)
    lease = node.leases.grant(session.id, leased, now, ttl_s).id if leased else 0
    return wire.Scanned(lease, at if at <= node.residency.last_id else -1, b"".join(row for _, row in rows))


def _rows(node: Node, groups: list[Group]) -> Iterable[tuple[Group, bytes]]:
    for group in groups:
        for slot in group.slots:
            header = node.arena.header(slot)
            sound = node.arena.intact(slot, header) and (header.namespace, header.key) == (group.namespace, group.key)
            length = header.length if sound and header.length == group.length else 0
            place = (node.arena.offset(slot), header.generation, length, header.checksum)
            yield group, wire.SCANNED_ROW.pack(*place, group.namespace, group.key)
