"""The arena's memory: may it be locked, is it faulted in, is there room for a next start, was anything damaged?"""

import os
from pathlib import Path

import psutil

from kvd import wire
from kvd.ctl.checks.finding import Finding
from kvd.ctl.terminal import percent, size
from kvd.places import arena_path

_PREFAULT = "arena.prefault = true needs Linux 5.14; right after a start, wait until it is done"


def memlock(status: wire.Status) -> list[Finding]:
    """Is the limit high enough for what this node does with the arena?"""
    total, limit = status.tiers[0].bytes_total, status.memlock_bytes
    shown = "unlimited" if limit < 0 else size(limit)
    raise_it = "set LimitMEMLOCK=infinity in kvd's unit and restart it"
    for warning in status.warnings:
        if "memlock" in warning:
            return [Finding("memlock", "red", warning, f"{raise_it}, or set arena.lock = false")]
    if limit < 0 or limit >= total:
        return [Finding("memlock", "green", f"memlock limit is {shown}")]
    if status.gpus:
        message = f"memlock limit is {shown}, the arena has {size(total)}: it cannot be pinned for the GPU"
        return [Finding("memlock", "yellow", message, raise_it)]
    return [
        Finding("memlock", "green", f"memlock limit is {shown}: enough, nothing here is locked and no GPU is seen")
    ]


def arena(status: wire.Status) -> list[Finding]:
    """Is it faulted in, how full is it, and does the node have what is missing?"""
    tier = status.tiers[0]
    full = f"{percent(tier.bytes_used, tier.bytes_total)} full, {tier.pages:,} pages"
    missing = max(0, tier.bytes_total - tier.prefaulted_bytes)
    free = psutil.virtual_memory().available
    if missing > free:
        message = f"{size(missing)} of the arena are not backed by memory yet, the node has {size(free)} left"
        return [Finding("arena", "red", message, "lower arena.size_bytes, or stop what else uses the memory")]
    if missing:
        message = f"{size(tier.prefaulted_bytes)} of {size(tier.bytes_total)} are faulted in: first writes are slow"
        return [Finding("arena", "yellow", message, _PREFAULT)]
    return [Finding("arena", "green", f"{size(tier.bytes_total)}, faulted in, {full}")]


def room(status: wire.Status) -> list[Finding]:
    """Would the arena's file find room at the next start?"""
    place = status.arena.rpartition(", ")[0]
    if not place.startswith("/"):
        return [Finding("room", "green", f"the arena is a {place}: it needs no room on a file system")]
    path = Path(place)
    try:
        file, disk = path.stat(), os.statvfs(path.parent)
    except FileNotFoundError:
        remedy = "something removed it (RemoveIPC= in logind.conf?): run kvd as a system user, and restart it"
        return [Finding("room", "yellow", f"{path} is gone: a restart begins with an empty cache", remedy)]
    free = disk.f_bavail * disk.f_frsize
    missing = file.st_size - file.st_blocks * 512 - free
    if missing > 0:
        message = f"{path.parent} lacks {size(missing)} for the whole arena: kvd may crash, and will not start again"
        return [Finding("room", "red", message, f"free space in {path.parent}, or lower arena.size_bytes")]
    return [Finding("room", "green", f"{path.parent} has {size(free)} free beside the arena")]


def room_to_start() -> list[Finding]:
    """No kvd runs: would the arena of the settings that are in effect here find room?"""
    from kvd.settings import load_daemon_settings  # half of kvdctl's start-up, and seldom needed

    settings = load_daemon_settings(None, os.environ)
    path = settings.arena.path or arena_path(settings.run_dir, os.getuid())
    disk = os.statvfs(path.parent)
    held = path.stat().st_blocks * 512 if path.exists() else 0
    free = disk.f_bavail * disk.f_frsize + held
    wanted = settings.arena.size_bytes
    if free < wanted:
        message = f"{path.parent} has room for {size(free)}, arena.size_bytes is {size(wanted)}"
        return [Finding("room", "red", message, f"free space in {path.parent}, or lower arena.size_bytes")]
    return [Finding("room", "green", f"{path.parent} has room for the arena of {size(wanted)}: {size(free)}")]


def damage(status: wire.Status) -> list[Finding]:
    """Has anything been found damaged since kvd started?"""
    counts = {name: n for name, n in sorted(status.counters.items()) if name.startswith("corrupt_") and n}
    if not counts:
        return [Finding("damage", "green", "no damaged page since kvd started")]
    shown = ", ".join(f"{name} {n}" for name, n in counts.items())
    remedy = "run `kvdctl verify`; if the count grows, this node's memory is failing: look for ECC errors in dmesg"
    return [Finding("damage", "yellow", f"damaged pages were found and quarantined: {shown}", remedy)]


def warnings(status: wire.Status) -> list[Finding]:
    """Whatever else the daemon itself warns of."""
    settings = "correct that setting in /etc/kvd/kvd.toml and restart kvd"
    limit = "in the unit (`systemctl edit kvd`), and restart kvd; or connect fewer programs"
    return [
        Finding("warning", "yellow", text, limit if "LimitNOFILE" in text else settings)
        for text in status.warnings
        if "memlock" not in text
    ]
