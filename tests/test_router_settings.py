"""The router's settings: what is wrong is named with its remedy, before anybody is served."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvd.errors import SettingsError
from kvd.router.settings import RouterSettings, example, load_router_settings
from kvd.router.steering import Worker, worker_at
from tests.harness import eventually
from tests.router_harness import MockWorker, Router, post

WORKERS = "workers = ['http://127.0.0.1:30000']\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "at least one"),
        ("workers = ['127.0.0.1:30000']", "http://HOST:PORT"),
        ("workers = ['https://a']", "http://HOST:PORT"),
        ("workers = ['http://a:1', 'http://A:1/']", "twice"),
        (WORKERS + "drain = 5", "drain"),
        (WORKERS + "[[nodes]]\nevents = 'http://a:1'", "tcp://HOST:PORT"),
        (WORKERS + "[[nodes]]\nevents = 'tcp://a:65535'", "no such port"),
        (WORKERS + 2 * "[[nodes]]\nevents = 'tcp://a:1'\n", "twice"),
        ("join_announced = false\n[[nodes]]\nevents = 'tcp://a:1'", "at least one"),
        (WORKERS + "[listen]\nprocesses = 0", "listen.processes"),
        (WORKERS + "[routing]\npolicy = 'best'", "routing.policy"),
        (WORKERS + "[limits]\nbody_bytes = 2000\nbodies_bytes = 1024", "bodies_bytes must"),
        ("= 5", "not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "router.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_router_settings(file, {}, {})
    assert names in str(caught.value)
    assert caught.value.hint


def test_all_that_is_wrong_is_said_at_once_and_in_our_words(tmp_path: Path) -> None:
    file = tmp_path / "router.toml"
    file.write_text(
        "workers = ['http://a:1', 'http://b:1', 'http://b:1']\nprot = 5\nclients = 5\ndrain_s = 'long'\n"
        "[listen]\nport = 'x'\nprocesses = 0\n[limts]\nhead_s = 1\n[routing]\npolicy = 'foo'\n[queue]\nsecond = 1"
        "\n[tenants]\nsecret_file = '/x'\n[[nodes]]\nreplay = 'tcp://a:1'"
    )
    with pytest.raises(SettingsError) as caught:
        load_router_settings(file, {}, {})
    said = caught.value.message.split("; ")
    assert [line for line in said if not line.startswith("routing.policy: must be")] == [
        "workers: http://b:1 is there twice",
        "nodes.0.events: it is needed",
        "listen.port: must be a whole number, not 'x'",
        "listen.processes: must be greater than or equal to 1, not 0",
        "queue.second: no such setting, did you mean queue.seconds?",
        "tenants: secret_file without keys_file: no key would be needed, set both or neither",
        "drain_s: must be a number, not 'long'",
        "prot: no such setting",
        "clients: no such setting, did you mean listen.clients?",
        "limts: no such setting, did you mean limits?",
    ]
    assert any(line.startswith("routing.policy: must be ") and line.endswith(", not 'foo'") for line in said)
    assert caught.value.hint == f"correct them in {file} or the environment"


def test_what_a_variable_gets_wrong_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "router.toml"
    file.write_text(WORKERS + "drain_s = -1")
    monkeypatch.setenv("KVD_ROUTER_LISTEN__PORT", "x")
    with pytest.raises(SettingsError) as caught:
        load_router_settings(file, {"KVD_ROUTER_LISTEN__PORT": "x"}, {})
    assert caught.value.message == (
        "KVD_ROUTER_LISTEN__PORT: must be a whole number, not 'x'; drain_s: must be greater than or equal to 0, not -1"
    )


@pytest.mark.parametrize("setting", ["tenants.keys_file", "tenants.secret_file", "worker_key_file"])
def test_a_file_that_cannot_be_read_is_named_with_its_setting(tmp_path: Path, setting: str) -> None:
    section, _, name = setting.rpartition(".")
    (tmp_path / "keys.toml").write_text("[a]\nsha256 = []")
    keys = f"keys_file = '{tmp_path}/keys.toml'\n" if name == "secret_file" else ""
    (tmp_path / "router.toml").write_text(f"{WORKERS}{f'[{section}]' * bool(section)}\n{keys}{name} = '/nope'")
    settings = load_router_settings(tmp_path / "router.toml", {}, {})
    with pytest.raises(SettingsError, match=f"^{re.escape(setting)}: cannot read /nope"):
        settings.read_worker_key() if name == "worker_key_file" else settings.read_tenants()


@pytest.mark.parametrize(
    "url",
    [
        'http://a"b:1', "http://a\\b:1", "http://a{b}:1", "http://a b:1", "http://a:1\n", "http://a\tb:1", " http://a:1",
        "http://a\x7f:1", "http://\u00e9:1", "http://a:0", "http://a:65536", "http://a:1#x", "http://a:1#", "http://a:1?",
        "http://u@a:1", "http://@a:1", "http://a..b:1", "http://.a:1", "http://:1", "http://" + 64 * "a" + ":1",
        "http://" + 130 * "a." + "a:1", "http://[a]:1", "http://[::1", "http://a[::1]:1", "http://[::1]a:1",
        "http://[fe80::1%a,b]:1", "http://a:1/x", "http://a%41:1",
    ],
)  # fmt: skip
def test_what_is_no_workers_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT") as caught:
        worker_at(url)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("url", "name", "host", "port"),
    [
        ("http://Host-1.Example:30000/", "http://host-1.example:30000", "host-1.example", 30000),
        ("http://sglang_1", "http://sglang_1", "sglang_1", 80),
        ("http://a.svc.:1", "http://a.svc.:1", "a.svc.", 1),
        ("HTTP://10.0.0.1:030", "http://10.0.0.1:30", "10.0.0.1", 30),
        ("http://[FD00::5]:1", "http://[fd00::5]:1", "fd00::5", 1),
        ("http://[fe80::1%eth0]:1", "http://[fe80::1%eth0]:1", "fe80::1%eth0", 1),
    ],
)
def test_a_worker_has_one_name_however_its_url_is_written(url: str, name: str, host: str, port: int) -> None:
    assert worker_at(url) == Worker(name, host, port)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "router.toml"
    file.write_text(WORKERS + "drain_s = 1\n[listen]\nport = 1\nprocesses = 2\nclients = 9")
    monkeypatch.setenv("KVD_ROUTER_LISTEN__PORT", "2")
    monkeypatch.setenv("KVD_ROUTER_LISTEN__PROCESSES", "3")
    environ = {"KVD_ROUTER_LISTEN__PORT": "2", "KVD_ROUTER_LISTEN__PROCESSES": "3"}
    settings = load_router_settings(file, environ, {"listen": {"port": 4}})
    assert (settings.listen.port, settings.listen.processes, settings.listen.clients) == (4, 3, 9)


def test_a_node_is_told_apart_by_where_it_publishes_and_answers(tmp_path: Path) -> None:
    file = tmp_path / "router.toml"
    file.write_text("[[nodes]]\nevents = 'tcp://a:1'\n[[nodes]]\nevents = 'ipc:///x'\nreplay = 'tcp://b:2'\n")
    options = load_router_settings(file, {}, {}).read_fleet()
    assert options.nodes == [("tcp://a:1", "tcp://a:2"), ("ipc:///x", "tcp://b:2")]
    assert options.join_announced
    file.write_text(f"{WORKERS}model_path = '{tmp_path}'")
    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        load_router_settings(file, {}, {}).read_fleet()


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(SettingsError, match="KVD_ROUTER_PORT"):
        load_router_settings(None, {"KVD_ROUTER_PORT": "5"}, {})


def test_a_list_in_a_variable_that_is_not_json_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVD_ROUTER_WORKERS", "http://a:1")
    with pytest.raises(SettingsError) as caught:
        load_router_settings(None, {"KVD_ROUTER_WORKERS": "http://a:1"}, {})
    assert caught.value.message == "KVD_ROUTER_WORKERS: a list is given as JSON"
    assert "KVD_ROUTER_WORKERS='[" in caught.value.hint


def test_how_kvdctl_finds_the_router_is_no_setting_of_it(tmp_path: Path) -> None:
    file = tmp_path / "router.toml"
    file.write_text(WORKERS)
    environ = {"KVD_ROUTER_URL": "http://127.0.0.1:30080", "KVD_ROUTER_KEY": "secret"}
    assert load_router_settings(file, environ, {}) == load_router_settings(file, {}, {})


def test_the_example_is_what_the_settings_say(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "deploy/router.toml").read_text()
    assert text == example(), "run: kvd-router --example-config > deploy/router.toml"
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    lines = [line for line in lines if re.match(r"\w+ = (?!\"\"$|\.\.\.$|\[\]$)|\[\w", line)]  # what has a default
    uncommented = tmp_path / "router.toml"
    uncommented.write_text(WORKERS + "\n".join(lines))
    (tmp_path / "plain.toml").write_text(WORKERS)
    plain = load_router_settings(tmp_path / "plain.toml", {}, {})
    assert load_router_settings(uncommented, {}, {}) == plain
    assert len(lines) > 15


def test_the_router_itself_ends_with_78_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvd.router.main", "--worker", "http://127.0.0.1:1", "--host", "192.0.2.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 78
    assert "192.0.2.1" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_key_is_hashed_without_being_an_argument() -> None:
    command = [sys.executable, "-m", "kvd.router.main", "--hash-key"]
    done = subprocess.run(command, input="secret\n", capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\n"


@pytest.mark.parametrize("given", ["", "\n", " \t\nsecret\n"])
def test_no_key_has_no_digest(given: str) -> None:
    command = [sys.executable, "-m", "kvd.router.main", "--hash-key"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no API key on standard input" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("given", ["one key of many\n", "a-key-of-sixteen-characters\nanother\n", "clé-of-16-letters"])
def test_what_no_client_can_send_has_no_digest(given: str) -> None:
    command = [sys.executable, "-m", "kvd.router.main", "--hash-key"]
    done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"not one API key" in done.stderr


def test_a_key_that_can_be_guessed_is_warned_of() -> None:
    command = [sys.executable, "-m", "kvd.router.main", "--hash-key"]
    for key, warned in (("short", True), ("0123456789abcdef", False)):
        done = subprocess.run(command, input=key, capture_output=True, text=True, timeout=20, check=True)
        assert len(done.stdout) == 65
        assert ("can be guessed" in done.stderr) == warned


def with_worker_key(folder: Path, key: bytes) -> RouterSettings:
    (folder / "worker.key").write_bytes(key)
    (folder / "router.toml").write_text(f"{WORKERS}worker_key_file = '{folder / 'worker.key'}'")
    return load_router_settings(folder / "router.toml", {}, {})


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_workers_key_is_a_line_of_a_file(tmp_path: Path, end: bytes) -> None:
    assert with_worker_key(tmp_path, b"!secret~" + end).read_worker_key() == b"!secret~"


@pytest.mark.parametrize(
    "key", [b"", b"\n", b"one\ntwo\n", b"one\rtwo", b"a b", b" a", b"a\t\n", b"caf\xc3\xa9", b"\x7f", b"a\0"]
)
def test_what_is_no_key_of_a_worker_is_refused_before_anybody_is_served(tmp_path: Path, key: bytes) -> None:
    settings = with_worker_key(tmp_path, key)
    for read in (settings.read_worker_key, settings.read_fleet):
        with pytest.raises(SettingsError) as caught:
            read()
        assert str(tmp_path / "worker.key") in caught.value.message
        assert "one line" in caught.value.hint


def test_one_process_that_dies_takes_the_others_along(tmp_path: Path) -> None:
    """systemd starts all of them anew: none is missed for long, and none serves unwatched."""
    with MockWorker() as worker:
        router = Router(tmp_path, worker.url, listen__processes=3)
        try:
            children = eventually(lambda: psutil.Process(router.process.pid).children(), 5)
            eventually(lambda: router.log.read_text().count("serves") == 3)
            assert router.talk(post("/echo", b"hi", "connection: close")).endswith(b"hi")
            children[0].send_signal(signal.SIGKILL)
            assert router.process.wait(10) == 1
            assert not any(child.is_running() for child in children)
        finally:
            router.process.kill()
            router.process.wait()
