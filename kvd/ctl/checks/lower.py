"""The tiers below RAM: do they work, do they keep up, has anything on them been found damaged?"""

from kvd import wire
from kvd.ctl.checks.finding import Finding, Level
from kvd.ctl.terminal import percent, printable, size

_BEHIND = 1024  # pages that wait to be written: some seconds of a fast disk

# What a tier says of its trouble -> what to do. The first part that occurs in it decides.
_REMEDIES: tuple[tuple[str, str], ...] = (
    ("opening", "wait: it reads its catalog, kvd serves from RAM meanwhile; after minutes, look at dmesg"),
    ("silent", "its disk does not answer: look at dmesg; kvd tries again by itself and serves from RAM meanwhile"),
    ("nothing is mounted", "mount the disk; kvd looks again by itself within half a minute"),
    (
        "SIGBUS",
        "its disk fails, or its catalog was cut short: look at dmesg; on a sound disk, remove the tier's folder",
    ),
    ("SIGKILL", "look at dmesg: memory may have been short; kvd starts it again by itself"),
    ("process ended", "look for its last lines in `journalctl -u kvd`; kvd starts it again by itself"),
    ("No space left", "make room on its disk; kvd tries again by itself and serves from RAM meanwhile"),
    ("quota exceeded", "make room for kvd on its disk; kvd tries again by itself and serves from RAM meanwhile"),
    ("ermission", "give the user of kvd the folder (in the unit: ReadWritePaths=), then restart kvd"),
    ("ead-only", "give the user of kvd the folder (in the unit: ReadWritePaths=), then restart kvd"),
)
# Counters of a shared tier that reads and does not write.
_READ_ONLY = {"no_permission": "kvd may not write there", "read_only": "the file system is read-only"}
_ELSE = "look at dmesg and at the disk; kvd tries again by itself and serves from RAM meanwhile"


def tiers(status: wire.Status) -> list[Finding]:
    """One finding per lower tier."""
    return [_tier(tier) for tier in status.tiers[1:]]


def _tier(tier: wire.TierStatus) -> Finding:
    if tier.trouble:
        level: Level = "yellow" if tier.trouble.startswith("opening") else "red"
        remedy = next((remedy for part, remedy in _REMEDIES if part in tier.trouble), _ELSE)
        return Finding(tier.name, level, f"it does not work: {printable(tier.trouble)}", remedy)
    if damaged := tier.counters.get("damaged", 0):
        message = f"{damaged} damaged pages were found and dropped since it was opened"
        return Finding(tier.name, "yellow", message, "if the count grows the disk is failing: look at its SMART data")
    for reason, what in _READ_ONLY.items():
        if tier.counters.get(reason, 0):
            message = f"nothing new is written: {what}; what it has is still read"
            return Finding(tier.name, "yellow", message, "give the user of kvd that right; kvd tries again by itself")
    if tier.counters.get("disk_full", 0):
        message = f"its disk has no room for more: it holds {size(tier.bytes_used)} of {size(tier.bytes_total)}"
        return Finding(tier.name, "yellow", message, "make room on the disk, or lower the tier's size_bytes")
    waiting = tier.counters.get("waiting_to_be_written", 0)
    full = f"{size(tier.bytes_used)} of {size(tier.bytes_total)} ({percent(tier.bytes_used, tier.bytes_total)})"
    if waiting > _BEHIND:
        message = f"{waiting:,} pages wait to be written: the disk is slower than what the workers produce"
        return Finding(tier.name, "yellow", message, "a faster disk keeps more; nothing waits for it meanwhile")
    return Finding(tier.name, "green", f"{tier.pages:,} pages, {full}; {waiting} wait to be written")
