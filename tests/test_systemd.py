"""The units: correct, hardened; in a really booted systemd kvd keeps the RAM tier through kill -9 and restart, and the
router comes back and stops cleanly."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import systemd
from tests.harness import Daemon

ROOT = Path(__file__).parents[1]
UNITS = ROOT / "deploy/systemd"
UNIT = UNITS / "kvd.service"
needs_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="no systemd-analyze: apt install systemd"
)
_missing = [tool for tool in ("systemd-nspawn", "dbus-daemon", "mount") if not shutil.which(tool)]
needs_boot = pytest.mark.skipif(
    os.getuid() != 0 or bool(_missing),
    reason="needs root" if os.getuid() else f"no {', '.join(_missing)}: apt install systemd-container dbus",
)


@needs_analyze
@pytest.mark.parametrize("user", ["kvd", "kvd-router"])
def test_the_unit_is_correct_and_hardened(user: str, tmp_path: Path) -> None:
    unit = UNITS / f"{user}.service"
    copy = tmp_path / unit.name
    text = unit.read_text()
    assert f"User={user}\nGroup={user}\n" in text
    copy.write_text(text.replace(f"User={user}\nGroup={user}\n", ""))  # the user is made by sysusers, not here
    assert f"u {user} - " in (UNITS / "kvd.sysusers").read_text()
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    assert unit.name not in verified.stderr, verified.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert rated.returncode == 0, rated.stdout


class Keeper:
    """The service manager's side of sd_notify: a stand-in that keeps what is stored with it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(10)
        self.states: list[str] = []
        self.fds: dict[str, int] = {}

    def wait_for(self, state: str) -> None:
        while not any(state in line for line in self.states):
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            text = data.decode()
            self.states += text.splitlines()
            if fds:
                self.fds[text.partition("FDNAME=")[2].splitlines()[0]] = fds[0]

    def close(self) -> None:
        self._socket.close()
        for fd in self.fds.values():
            os.close(fd)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path)
    yield made
    made.close()


def test_the_arena_is_parked_with_the_service_manager_and_comes_back(tmp_path: Path, keeper: Keeper) -> None:
    daemon = Daemon(tmp_path / "run")
    daemon.env["NOTIFY_SOCKET"] = str(keeper.path)
    daemon.start()
    keeper.wait_for("READY=1")
    assert set(keeper.fds) == {"kvd-arena"}
    assert not daemon.arena_path.exists(), "a parked arena needs no file"
    assert "parked" in daemon.status().arena
    daemon.kill()
    daemon.stop()
    # What systemd does at the next start: the descriptor as number 3, and who it is meant for.
    again = [
        sys.executable, "-c",
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='kvd-arena');"
        "os.execv(sys.executable, [sys.executable, '-m', 'kvd.main'])",
        str(keeper.fds["kvd-arena"]),
    ]  # fmt: skip
    with daemon.log.open("ab") as log:
        daemon.process = subprocess.Popen(again, env=daemon.env, pass_fds=[keeper.fds["kvd-arena"]], stderr=log)
    daemon.wait_ready()
    assert "took over 0 pages" in daemon.log.read_text()
    daemon.stop()
    keeper.wait_for("STOPPING=1")  # raises when it is not said


def test_without_a_service_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert systemd.notify("READY=1") is False
    assert systemd.listened_fds({"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "kvd-arena"}, 99) == {}


DROP_IN = """[Service]
# A checkout in somebody's home or in /tmp, run by root: the test's circumstances, not the unit's.
User=root
Group=root
ProtectHome=no
PrivateTmp=no
ExecStart=
ExecStart={python} -m kvd.main
Environment=PYTHONPATH={root} KVD_ARENA__SIZE_BYTES=67108864 KVD_ARENA__EXTENT_BYTES=8388608
WatchdogSec=2
"""
ROUTER_DROP_IN = """[Service]
User=root
Group=root
ProtectHome=no
PrivateTmp=no
ExecStart=
ExecStart={python} -m kvd.router.main --worker http://127.0.0.1:9
Environment=PYTHONPATH={root} KVD_ROUTER_LISTEN__PROCESSES=2
"""
SELFTEST = """[Unit]
After=basic.target
[Service]
Type=oneshot
TimeoutStartSec=90
Environment=PYTHONPATH={root}
ExecStart={python} {root}/tests/systemd_selftest.py /run/kvd-out/result.json
ExecStopPost=/bin/systemctl poweroff --no-block
"""
TARGET = "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\nWants=kvdselftest.service\n"


@needs_boot
@pytest.mark.timeout(180)
def test_in_a_booted_systemd_both_survive_kill_9_and_pages_restart_and_watchdog(tmp_path: Path) -> None:
    units, out, layers = tmp_path / "units", tmp_path / "out", tmp_path / "layers"
    units.mkdir()
    out.mkdir()
    layers.mkdir()
    places = {"python": sys.executable, "root": ROOT}
    for unit, drop_in in (("kvd.service", DROP_IN), ("kvd-router.service", ROUTER_DROP_IN)):
        shutil.copy(UNITS / unit, units)
        (units / f"{unit}.d").mkdir()
        (units / f"{unit}.d/test.conf").write_text(drop_in.format(**places))
    (units / "kvdselftest.service").write_text(SELFTEST.format(**places))
    (units / "kvdtest.target").write_text(TARGET)
    script = f"""
        set -e
        mount -t tmpfs -o size=256M tmpfs {layers}
        mkdir {layers}/upper {layers}/work {layers}/root
        mount -t overlay overlay -o lowerdir=/,upperdir={layers}/upper,workdir={layers}/work {layers}/root
        exec timeout 120 systemd-nspawn -q -D {layers}/root -M kvdtest{os.getpid()} --register=no --keep-unit \
          --private-network --bind-ro={units}:/run/systemd/system --bind={out}:/run/kvd-out --bind-ro={ROOT} \
          -b systemd.unit=kvdtest.target
    """
    # Mounts of its own, which end with it.
    boot = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = out / "result.json"
    assert result.exists(), boot.stdout[-3000:] + boot.stderr[-3000:]
    seen = json.loads(result.read_text())
    journal = seen.pop("journal", "")
    assert seen == {
        "stored": 20,
        "after kill -9": 20,
        "restarts": 1,
        "after restart": 20,
        "after the watchdog": 20,
        "after stop and start": 0,
        "router": "ok",
        "router after kill -9": "ok",
        "router stopped": "success",
    }, f"{seen}\n{journal}"
