"""How many files this process may have open: as many as it is allowed to, from the start; and whether they run out.

The usual limit is 1024. ZeroMQ aborts the process where none is left for a connection (ipc_listener.cpp), so new
connections have to be refused before.
"""

import os
import resource
from contextlib import suppress

_RESERVE = 64  # or an eighth of the limit: for what comes before the next look, and for our own files


def raise_limit() -> None:
    """From now on as many as may be had without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # more than this kernel gives anybody (fs.nr_open): as it is, then
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def shortage() -> str:
    """That few are left, in words; else nothing. Looks at all that are open: a millisecond for thousands."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:  # not even this one can be opened
        used = limit
    if used < limit - max(limit // 8, _RESERVE):
        return ""
    return f"{used} of {limit} descriptors are in use, no more connections are taken: raise LimitNOFILE"
