"""Where the daemon's sockets are, when nobody says otherwise. Pure: the environment arrives as an argument.

The worker's plugin, kvdctl and the daemon must agree without a configuration file, so there is one rule:
an explicit setting wins, then $KVD_RUN_DIR, then /run/kvd for root and service users, else a private
folder of the user.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

SOCKET = "kvd.sock"  # registration, liveness, descriptors, operators
DATA_SOCKET = "kvd.data"  # ZeroMQ


def run_dir(env: Mapping[str, str], uid: int) -> Path:
    """The folder that holds the daemon's sockets for this user."""
    if given := env.get("KVD_RUN_DIR"):
        return Path(given)
    if uid == 0 or env.get("RUNTIME_DIRECTORY") == "/run/kvd":
        return Path("/run/kvd")
    if runtime := env.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "kvd"
    return Path(f"/tmp/kvd-{uid}")


def arena_path(folder: Path, uid: int) -> Path:
    """The arena's file without systemd: one per run directory and user."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    return Path(f"/dev/shm/kvd-{uid}-{digest}.arena")


def replay_endpoint(events: str) -> str:
    """Where a node that publishes at this endpoint answers requests: the next port, or the path with .replay."""
    if not events.startswith("tcp://"):
        return f"{events}.replay"
    host, _, port = events.rpartition(":")
    return f"{host}:{int(port) + 1}"
