"""The service manager's protocol: readiness, watchdog, and the descriptor store. Without systemd all are no-ops.

Source: sd_notify(3), sd_listen_fds(3). A descriptor stored under a name survives the daemon's death, kill -9
included, and comes back at the next start as LISTEN_FDS: that is how the RAM tier stays warm.
"""

import os
import socket
from collections.abc import MutableMapping

_FIRST_FD = 3


def notify(state: str, fds: tuple[int, ...] = ()) -> bool:
    """Send a state line ("READY=1"); False without a service manager."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            if fds:
                socket.send_fds(sock, [state.encode()], list(fds))
            else:
                sock.send(state.encode())
    except OSError:
        return False  # a service manager that went away, or want of descriptors, must not take the cache with it
    return True


def store(name: str, fd: int) -> bool:
    """Park a descriptor; False when nobody keeps it."""
    return notify(f"FDSTORE=1\nFDNAME={name}", (fd,))


def forget(name: str) -> None:
    """Take a parked descriptor out of the store."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def listened_fds(environ: MutableMapping[str, str], pid: int) -> dict[str, int]:
    """Descriptors handed over at start, by name. Clears the variables, so that children do not believe them."""
    count = environ.pop("LISTEN_FDS", "0")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    owner = environ.pop("LISTEN_PID", "")
    if owner != str(pid) or not count.isdigit():
        return {}
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    return {name: fd for name, fd in zip(names, fds, strict=False)}


def watchdog_interval_s(environ: MutableMapping[str, str], pid: int) -> float | None:
    """How often to say WATCHDOG=1, or None."""
    usec, owner = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(pid))
    return int(usec) / 2e6 if usec.isdigit() and owner == str(pid) else None
