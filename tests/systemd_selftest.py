"""Runs inside a booted systemd: puts pages into kvd.service, kills, restarts and stops it, and writes what it saw.
Then the same with kvd-router.service, which keeps nothing and shall answer.

python systemd_selftest.py RESULT.json
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import xxhash

from kvd import wire
from kvd.client import Channels, Link
from kvd.errors import KvdError
from kvd.index import Name
from kvd.leasetable import LeaseTable
from kvd.pages import chain

SOCKET = Path("/run/kvd/kvd.sock")
SPEC = wire.NamespaceSpec(bytes(range(16)), 65536, 4, 0, 1, "kv", "selftest")
KEYS = chain(range(80), 4)


class Client:
    """A worker's session, opened anew after every restart."""

    def __init__(self) -> None:
        self._table = LeaseTable()
        deadline = time.monotonic() + 15
        while True:
            try:
                self.link = Link(SOCKET, "worker", "selftest", self._table.fd, 5.0)
                break
            except KvdError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.link.ask(wire.Join([SPEC]), wire.Joined, 5.0)
        self.channels = Channels(self.link.welcome)

    def put(self) -> int:
        joined = b"".join(KEYS)
        with self.channels.lend() as channel:
            reserved = channel.ask(lambda r: wire.ReservePages(r, 0, joined, 5.0), wire.Reserved, 5.0)
            rows = b""
            for key, (offset, generation, verdict) in zip(
                KEYS, wire.RESERVED_ROW.iter_unpack(reserved.rows), strict=True
            ):
                assert verdict == wire.WRITE
                data = key * 2048
                self.link.arena[offset : offset + len(data)] = data
                rows += wire.COMMIT_ROW.pack(offset, generation, xxhash.xxh3_128_digest(data))
            return channel.ask(lambda r: wire.CommitPages(r, reserved.reservation, rows), wire.Committed, 5.0).pages

    def held(self) -> int:
        """Leading pages that are in the index and whose bytes are right."""
        pages = self.link.index.leading(Name.of(SPEC.digest), [key.hex() for key in KEYS]).pages
        if pages:
            with self.channels.lend() as channel:
                leased = channel.ask(lambda r: wire.LeasePages(r, 0, b"".join(KEYS[:pages]), 5.0), wire.Leased, 5.0)
            for key, (offset, _, length, _) in zip(KEYS, wire.LEASED_ROW.iter_unpack(leased.rows), strict=False):
                assert self.link.arena[offset : offset + length] == key * 2048, "wrong bytes"
        return pages

    def close(self) -> None:
        self.channels.close()
        self.link.close()
        self._table.close()


def held_now() -> int:
    client = Client()
    try:
        return client.held()
    finally:
        client.close()


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True).stdout.strip()


def healthy() -> str:
    """What the router says, once it says something."""
    deadline = time.monotonic() + 15
    while True:
        try:
            with urllib.request.urlopen("http://127.0.0.1:30080/kvd/health", timeout=5) as reply:
                return str(reply.read().decode().strip())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def use_the_router(seen: dict[str, Any]) -> None:
    systemctl("start", "kvd-router.service")
    seen["router"] = healthy()
    os.kill(int(systemctl("show", "-p", "MainPID", "--value", "kvd-router.service")), signal.SIGKILL)
    deadline = time.monotonic() + 15
    while systemctl("show", "-p", "NRestarts", "--value", "kvd-router.service") != "1" and time.monotonic() < deadline:
        time.sleep(0.05)
    seen["router after kill -9"] = healthy()
    systemctl("stop", "kvd-router.service")
    seen["router stopped"] = systemctl("show", "-p", "Result", "--value", "kvd-router.service")


def main() -> None:
    seen: dict[str, Any] = {}
    try:
        systemctl("start", "kvd.service")
        client = Client()
        seen["stored"] = client.put()
        client.close()
        main_pid = int(systemctl("show", "-p", "MainPID", "--value", "kvd.service"))
        os.kill(main_pid, signal.SIGKILL)
        seen["after kill -9"] = held_now()
        seen["restarts"] = int(systemctl("show", "-p", "NRestarts", "--value", "kvd.service"))
        systemctl("restart", "kvd.service")
        seen["after restart"] = held_now()
        main_pid = int(systemctl("show", "-p", "MainPID", "--value", "kvd.service"))
        os.kill(main_pid, signal.SIGSTOP)
        seen["after the watchdog"] = held_now()
        systemctl("stop", "kvd.service")
        systemctl("start", "kvd.service")
        seen["after stop and start"] = held_now()
        use_the_router(seen)
    except Exception as error:
        seen["error"] = repr(error)
    seen["journal"] = subprocess.run(
        ["journalctl", "-u", "kvd", "-u", "kvd-router", "--no-pager", "-o", "cat"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    Path(sys.argv[1]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
