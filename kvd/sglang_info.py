"""What tells one SGLang worker from every other, from what it says of itself. Pure.

Its URL does not: a node knows its worker as 127.0.0.1, a router by another name, and the same URL means another worker
on another machine. Two names that do:

    server   "PORT-SEED": its HTTP port, and its random seed, which SGLang draws at each start unless it is given one.
             Its ranks know both too, so a node recognises whose rank has attached. For use within one node.
    life     digest of both and of how long each part of its start took: another one in each of its lives, anywhere.

A name is "" where what it is made of is missing. Two workers of one seed, port and release old enough to say nothing
of its start have equal names: who finds two takes neither.
"""

import hashlib
import json
from typing import Any

MOST_CHARACTERS = 64


def server_name(port: Any, seed: Any) -> str:
    """What a worker's ranks and its /server_info both know of it."""
    return f"{port}-{seed}"[:MOST_CHARACTERS] if isinstance(port, int) and isinstance(seed, int) else ""


def server(info: Any) -> str:
    """From what /server_info answers, decoded; nothing of it is relied upon."""
    return server_name(info.get("port"), info.get("random_seed")) if isinstance(info, dict) else ""


def life(info: Any) -> str:
    """From what /server_info answers, decoded: 32 hex digits.

    Each rank tells its own start; the whole server's differs with the process that is asked, where it has several.
    """
    if not isinstance(info, dict):
        return ""
    states = info.get("internal_states")
    ranks = [state for state in states if isinstance(state, dict)] if isinstance(states, list) else []
    starts = sorted(json.dumps(rank["startup_time"], sort_keys=True) for rank in ranks if rank.get("startup_time"))
    name = server(info)
    if not name and not starts:
        return ""
    return hashlib.sha256("\n".join([name, *starts]).encode()).hexdigest()[:32]
