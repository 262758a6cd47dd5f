"""`kvdctl doctor` about SGLang processes that should be attached and are not: real processes, real command lines."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kvd.ctl.checks.launched import MARK, plugin_settings
from tests.harness import Daemon, eventually
from tests.kvdctl import doctor, of

ATTACH = """
import sys
from pathlib import Path
from kvd.client import Link
from kvd.leasetable import LeaseTable
leases = LeaseTable()
link = Link(Path({socket!r}), "worker", "launched", leases.fd, 5.0)
sys.stdin.read()
"""
LAUNCH = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"


WAIT = "import sys; sys.stdin.read()"
FLAG = "--hicache-storage-backend-extra-config"


@contextmanager
def launched(code: str, *arguments: str, cwd: Path | None = None, **env: str) -> Iterator[int]:
    """A process with these arguments, as a server would have them; it ends when its input does."""
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=cwd, env={**os.environ, **env})
    try:
        yield process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


def test_a_server_with_the_plugin_that_is_not_attached_is_red(shared: Daemon) -> None:
    with launched(WAIT, MARK, KVD_RUN_DIR=str(shared.folder)) as pid:
        status, findings = doctor(shared)
    (lost,) = [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]
    assert (status, lost["level"]) == (1, "red")
    assert "may its user use the socket (mode 660" in lost["remedy"]


def test_a_server_that_looks_elsewhere_is_told_where_kvd_is(shared: Daemon, tmp_path: Path) -> None:
    extra = json.dumps({"module_path": MARK, "kvd": {"socket": str(tmp_path / "wrong.sock")}})
    with launched(WAIT, "--extra", extra) as pid:
        _, findings = doctor(shared)
    (lost,) = [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]
    assert f"it looks for kvd at {tmp_path}/wrong.sock: set KVD_RUN_DIR={shared.folder}" in lost["remedy"]


def test_a_server_whose_child_is_attached_is_fine(shared: Daemon) -> None:
    child = ATTACH.format(socket=str(shared.socket))
    with launched(LAUNCH.format(child=child), MARK, KVD_RUN_DIR=str(shared.folder)) as pid:
        eventually(lambda: shared.status().workers, 5, "the child is attached")
        _, findings = doctor(shared)
    assert not [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]


def test_a_server_that_is_attached_to_another_kvd_is_fine(shared: Daemon, daemon: Daemon) -> None:
    code = ATTACH.format(socket=str(daemon.socket))
    with launched(code, MARK, KVD_RUN_DIR=str(daemon.folder)) as pid:
        eventually(lambda: daemon.status().workers, 5, "it is attached")
        _, findings = doctor(shared)
    assert not [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]


def test_shells_and_searches_are_not_servers() -> None:
    assert plugin_settings(["/bin/bash", "-c", f"python -m sglang.launch_server {MARK}"], os.getcwd) is None
    assert plugin_settings(["grep", MARK], os.getcwd) is None
    assert plugin_settings(["python", "-m", "sglang.launch_server"], os.getcwd) is None
    assert plugin_settings([], os.getcwd) is None
    assert plugin_settings(["python3", "-m", "sglang.launch_server", f'{{"module_path": "{MARK}"}}'], os.getcwd) == {}


# -- settings in a file ------------------------------------------------------------------------------------

JSON = f'{{"module_path": "{MARK}", "kvd": {{"socket": "wrong.sock"}}}}'
TOML = f'module_path = "{MARK}"\n[kvd]\nsocket = "wrong.sock"\n'
YAML = f"""
backend_name: kvd
module_path: {MARK}  # the plugin
other: {{socket: not.this}}
kvd:
  # socket: not.this
  copy_threads: 2

  socket: wrong.sock
last: {{socket: not.this}}
"""


@pytest.mark.parametrize(
    ("name", "content"), [("extra.json", JSON), ("extra.toml", TOML), ("extra.yaml", YAML), ("EXTRA.YML", JSON)]
)
def test_a_server_with_its_settings_in_a_file_is_seen(name: str, content: str, shared: Daemon, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with launched(WAIT, FLAG, f"@{name}", cwd=tmp_path) as pid:
        status, findings = doctor(shared)
    (lost,) = [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]
    assert (status, lost["level"]) == (1, "red")
    assert f"it looks for kvd at {tmp_path}/wrong.sock: set KVD_RUN_DIR={shared.folder}" in lost["remedy"]


def test_a_file_without_a_socket_leaves_it_to_the_environment(shared: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "extra.toml"
    file.write_text(f'module_path = "{MARK}"')
    with launched(WAIT, f"{FLAG}=@{file}", KVD_RUN_DIR=str(shared.folder)) as pid:
        _, findings = doctor(shared)
    (lost,) = [f for f in of(findings, "sglang") if f"pid {pid} " in f["message"]]
    assert "may its user use the socket (mode 660" in lost["remedy"]


def test_a_server_with_its_settings_in_a_file_that_is_attached_is_fine(
    shared: Daemon, daemon: Daemon, tmp_path: Path
) -> None:
    """Also where kvdctl was pointed at another kvd than the file names."""
    file = tmp_path / "extra.json"
    file.write_text(json.dumps({"module_path": MARK, "kvd": {"socket": str(daemon.socket)}}))
    with launched(ATTACH.format(socket=str(daemon.socket)), FLAG, f"@{file}") as pid:
        eventually(lambda: daemon.status().workers, 5, "it is attached")
        here, there = doctor(daemon)[1], doctor(shared)[1]
    assert not [f for f in of(here + there, "sglang") if f"pid {pid} " in f["message"]]


def test_a_file_that_cannot_be_read_belongs_to_no_server(shared: Daemon, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with (
        launched(WAIT, FLAG, "@pipe.json", cwd=tmp_path) as pipe,
        launched(WAIT, FLAG, "@gone.json", cwd=tmp_path) as gone,
    ):
        _, findings = doctor(shared)
    told = [f["message"] for f in of(findings, "sglang")]
    assert told
    assert not [text for text in told if f"pid {pipe} " in text or f"pid {gone} " in text or "itself failed" in text]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.json", JSON[:-1]),
        ("list.json", f"[{JSON}]"),
        ("deep.json", "[" * 50_000),
        ("large.json", JSON + " " * (1 << 20)),
        ("another.json", JSON.replace("hicache", "other")),
        ("cut.toml", f"module_path = {MARK}"),
        ("deep.toml", "a = " + "[" * 50_000),
        ("comment.yaml", f"# module_path: {MARK}"),
        ("inner.yaml", f"other:\n  module_path: {MARK}"),
        ("bytes.yaml", f"module_path: {MARK}\n\udcff"),
        ("unknown.ini", TOML),
    ],
)
def test_a_malformed_file_belongs_to_no_server(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    assert plugin_settings(["python", FLAG, f"@{name}"], lambda: str(tmp_path)) is None


@pytest.mark.parametrize("argument", ["@", "@/", "@/dev/zero", "@\0.json", "@/proc/self/mem", "extra.json", ""])
def test_an_argument_that_names_no_file_belongs_to_no_server(argument: str) -> None:
    assert plugin_settings(["python", FLAG, argument], os.getcwd) is None
    assert plugin_settings(["python", FLAG], os.getcwd) is None


def test_a_process_that_is_gone_belongs_to_no_server() -> None:
    def gone() -> str:
        raise psutil.NoSuchProcess(1)

    assert plugin_settings(["python", FLAG, "@extra.json"], gone) is None


def test_of_two_files_the_last_one_counts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(JSON)
    (tmp_path / "b.toml").write_text(TOML.replace("wrong", "right"))
    command = ["python", FLAG, f"@{tmp_path}/a.json", f"{FLAG}=@{tmp_path}/b.toml"]
    assert plugin_settings(command, os.getcwd) == {"socket": "right.sock"}


@pytest.mark.parametrize(
    ("written", "socket"),
    [
        ("kvd: {copy_threads: 1, socket: /a/b.sock}", "/a/b.sock"),
        ('\'kvd\' : { "socket": "/with space/b.sock" }', "/with space/b.sock"),
        ("kvd:\r\n    socket: '/a.sock'  # here\r\n", "/a.sock"),
        ("kvd:\n  socket:\n  copy_threads: 1\n", None),
        ("kvd:\n  copy_threads: 1\nsocket: /not/this\n", None),
        ('kvd:\n  socket: ""\n', None),
        ("", None),
    ],
)
def test_the_socket_is_found_in_yaml(written: str, socket: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(f"---\nmodule_path: '{MARK}'\n{written}", newline="")
    found = plugin_settings(["python", FLAG, "@a.yml"], lambda: str(tmp_path))
    assert found is not None
    assert (found.get("socket") or None) == socket
