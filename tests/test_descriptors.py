"""More connections than descriptors: those in use go on, more are refused, and nothing ends."""

import resource
import subprocess
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import psutil
import pytest
import zmq

from kvd import wire
from kvd.client import Link
from kvd.errors import Unavailable
from kvd.places import DATA_SOCKET
from tests.harness import MIB, Daemon, PluginProcess, eventually, span

_LIMIT = 200


@pytest.mark.parametrize("program", ["kvd.main", "kvd.router.main"])
def test_the_limit_is_raised_at_start(program: str) -> None:
    code = f"""
import importlib, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.argv = ["x", "--worker=http://127.0.0.1:1", "--print-config"][:: 1 if "router" in {program!r} else 2]
importlib.import_module({program!r}).cli()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
assert soft == hard, (soft, hard)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("to", ["data", "sessions"])
def test_out_of_descriptors_nobody_more_is_let_in_and_who_is_in_goes_on(
    daemon: Daemon, worker: PluginProcess, to: str
) -> None:
    worker.do("put", keys=span(9))
    inside = daemon.tool()
    assert daemon.process is not None
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (_LIMIT, _LIMIT))
    with ExitStack() as stack:
        stack.callback(inside.close)
        context = stack.enter_context(zmq.Context())
        refused = 0
        for _ in range(_LIMIT):
            if to == "data":
                peer = stack.enter_context(context.socket(zmq.DEALER))
                peer.linger = 0
                peer.connect(f"ipc://{daemon.folder / DATA_SOCKET}")
            try:
                link = daemon.tool()
                stack.callback(link.close) if to == "sessions" else link.close()
            except Unavailable:
                refused += 1
        assert refused > _LIMIT // 8
        assert "of 200 descriptors are in use" in " ".join(asked(inside).warnings)
        assert worker.do("take", keys=span(9)) == ["right"] * 9
    eventually(lambda: lets_in(daemon), 10, "there is room again")
    with PluginProcess(daemon.socket) as another:
        assert another.do("wait")
        assert another.do("take", keys=span(9)) == ["right"] * 9
    assert "LimitNOFILE" in daemon.log.read_text()


@pytest.mark.parametrize("what", ["nothing", "its tier", "its service manager"])
def test_without_any_descriptor_kvd_goes_on_and_recovers(tmp_path: Path, what: str) -> None:
    daemon = Daemon(tmp_path / "run", nvme__path=tmp_path / "tier", nvme__size_bytes=256 * MIB)
    if what == "its service manager":
        daemon.env |= {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "1000000"}
    with daemon, PluginProcess(daemon.socket) as worker, closing(daemon.tool()) as inside:
        assert worker.do("wait")
        worker.do("put", keys=span(9))
        assert daemon.process is not None
        pid = daemon.process.pid
        had = resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        if what == "its tier":
            (tier,) = psutil.Process(pid).children()
            tier.kill()
            eventually(lambda: "cannot start its process" in asked(inside).tiers[1].trouble, 10)
        eventually(lambda: "LimitNOFILE" in " ".join(asked(inside).warnings), 10)
        assert worker.do("take", keys=span(9)) == ["right"] * 9
        resource.prlimit(pid, resource.RLIMIT_NOFILE, had)
        eventually(lambda: lets_in(daemon), 10, "there is room again")


def asked(link: Link) -> wire.Status:
    return link.ask(wire.GetStatus(), wire.Status, 5.0)


def lets_in(daemon: Daemon) -> bool:
    with suppress(Unavailable):
        return not daemon.status().warnings
    return False
