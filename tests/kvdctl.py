"""kvdctl for tests: the command in a process of its own, a worker that needs no plugin, and what the doctor found."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from kvd import wire
from kvd.client import Channels, Link
from kvd.ctl.checks.finding import Finding
from kvd.leasetable import LeaseTable
from kvd.pages import chain
from tests.harness import Daemon

PAGE = 64 << 10


def kvdctl(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from kvd.ctl import app; app()", *arguments]
    given = {k: v for k, v in os.environ.items() if not k.startswith("KVD_")} | env
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)


def on(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return kvdctl(*arguments, "--socket", str(daemon.socket))


def doctor(daemon: Daemon) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and findings, without what other people's SGLang processes on this machine may add."""
    ran = on(daemon, "doctor", "--json")
    document = json.loads(ran.stdout)
    assert ran.stderr == ""
    assert ran.returncode == (1 if document["level"] == "red" else 0)
    for finding in document["checks"]:
        assert finding["level"] == "green" or finding["remedy"], f"no remedy: {finding}"
    return ran.returncode, document["checks"]


def of(findings: list[dict[str, Any]], check: str) -> list[dict[str, Any]]:
    return [finding for finding in findings if finding["check"] == check]


class RawWorker:
    """A worker without the plugin: attaches, joins one namespace, stores pages."""

    def __init__(
        self, daemon: Daemon, label: str = "raw", join: bool = True, scratch: bool = False, tenant: str = "",
        server: str = "",
    ) -> None:  # fmt: skip
        self.leases = LeaseTable()
        self.link = Link(daemon.socket, "worker", label, self.leases.fd, 5.0)
        self.channels = Channels(self.link.welcome)
        digest = os.urandom(16) if scratch else bytes(range(16))
        self.spec = wire.NamespaceSpec(digest, PAGE, 16, 0, 1, "kv", label, scratch=scratch, tenant=tenant)
        if join:
            self.link.ask(wire.Join([self.spec], server), wire.Joined, 5.0)

    def found(self, keys: list[bytes]) -> int:
        """How many leading pages kvd says it holds."""
        with self.channels.lend() as channel:
            return channel.ask(lambda n: wire.Lookup(n, 0, b"".join(keys), 5.0), wire.Found, 5.0).pages

    def put(self, pages: int, first: int = 0) -> list[bytes]:
        """Store a chain; its keys."""
        keys = chain(range(first, first + 16 * pages), 16)
        with self.channels.lend() as channel:
            for at in range(0, pages, 64):
                joined = b"".join(keys[at : at + 64])
                parent = keys[at - 1] if at else b""
                reserved = channel.ask(
                    lambda n, k=joined, p=parent: wire.ReservePages(n, 0, k, 5.0, p), wire.Reserved, 5.0
                )
                done = b""
                for offset, generation, verdict in wire.RESERVED_ROW.iter_unpack(reserved.rows):
                    if verdict == wire.WRITE:
                        data = os.urandom(PAGE)
                        self.link.arena[offset : offset + PAGE] = data
                        done += wire.COMMIT_ROW.pack(offset, generation, xxhash.xxh3_128_digest(data))
                number = reserved.reservation
                channel.ask(lambda n, r=number, d=done: wire.CommitPages(n, r, d), wire.Committed, 5.0)
        return keys

    def lease(self, keys: list[bytes], ttl_s: float = 60.0) -> list[int]:
        """Hold pages; where their bytes are."""
        with self.channels.lend() as channel:
            leased = channel.ask(lambda n: wire.LeasePages(n, 0, b"".join(keys), ttl_s), wire.Leased, 5.0)
        return [row[0] for row in wire.LEASED_ROW.iter_unpack(leased.rows)]

    def report(self, circuit: str, **counters: int) -> None:
        self.link.send(wire.Report(circuit, counters))
        self.link.ask(wire.Ping(1), wire.Pong, 5.0)

    def close(self) -> None:
        self.link.close()
        self.channels.close()
        self.leases.close()

    def __enter__(self) -> "RawWorker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@contextmanager
def other_version(path: Path) -> Iterator[Path]:
    """A daemon of the future: refuses everybody."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def refuse() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(wire.frame(wire.Refusal("this kvd speaks protocol 99", "install the same version")))

        thread = threading.Thread(target=refuse)
        thread.start()
        yield path
        thread.join()


def a_status(**changes: Any) -> wire.Status:
    tier = wire.TierStatus("ram", 64 << 20, 0, 0, 0, 0, 0, 16, 16, 64 << 20)
    plain = wire.Status("1", 1, 1, 1.0, "s", "memfd, parked with systemd", 0, [tier], [], {}, 1, 8 << 20, [], [])
    return msgspec.structs.replace(plain, **changes)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding
