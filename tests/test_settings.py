"""Settings: what is unknown, malformed or contradictory refuses to start, and names itself and the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from kvd.errors import SettingsError
from kvd.settings import TenantSettings, example, load_daemon_settings
from kvd.settingsfile import described


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVD_RUN_DIR", "KVD_ARENA__SIZE_BYTES", "KVD_ARENA__EXTENT_BYTES"):
        monkeypatch.delenv(name, raising=False)


def test_it_starts_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_daemon_settings(None, {})
    assert settings.arena.size_bytes == 2 << 30
    with pytest.raises(ValueError, match="frozen"):
        settings.max_sessions = 3  # type: ignore[misc]


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text("max_sessions = 7\n[arena]\nsize_bytes = 134217728\nkeep_on_stop = true\n")
    monkeypatch.setenv("KVD_ARENA__SIZE_BYTES", "268435456")
    settings = load_daemon_settings(file, {"KVD_ARENA__SIZE_BYTES": "268435456"})
    assert (settings.max_sessions, settings.arena.size_bytes, settings.arena.keep_on_stop) == (7, 268435456, True)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("max_sesions = 7", "max_sesions"),
        ("[arena]\nsize = 5", "arena.size"),
        ("[arena]\nsize_bytes = 5", "size_bytes must hold"),
        ("[arena]\nextent_bytes = 5000", "extent_bytes must be"),
        ("[nvme]\npath = '/a/b'\nmount_point = '/c'", "mount_point must be path"),
        ("[nvme]\nmount_point = '/c'", "mount_point must be path"),
        ("[tenants.a]\nshared_reserve_bytes = 2\nshared_burst_bytes = 1", "a reserve must not be above the burst"),
        (
            "[shared]\nquota_bytes = 2097152\n[tenants.a]\nshared_reserve_bytes = 2097153",
            "shared.quota_bytes is 2097152",
        ),
        ("[events]\nendpoint = '127.0.0.1:5557'", "neither tcp"),
        ("[events]\nendpoint = 'tcp://0.0.0.0:5557'", "events.plain"),
        ("[events]\nworkers = ['http://a:1']", "without endpoint"),
        ("[events]\nendpoint = 'ipc:///a'\nworkers = ['a:1']", "is not a URL"),
        ("log_level = 'loud'", "log_level"),
        ("max_sessions = 0", "max_sessions"),
        ("= 5", "not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_daemon_settings(file, {})
    assert names in str(caught.value)
    assert caught.value.hint


def test_a_list_in_a_variable_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVD_EVENTS__ENDPOINT", "ipc:///a")
    for value, right in (('["http://a:1"]', True), ("http://a:1", False)):
        monkeypatch.setenv("KVD_EVENTS__WORKERS", value)
        environ = {"KVD_EVENTS__ENDPOINT": "ipc:///a", "KVD_EVENTS__WORKERS": value}
        if right:
            assert load_daemon_settings(None, environ).events.workers == ("http://a:1",)
            continue
        with pytest.raises(SettingsError) as caught:
            load_daemon_settings(None, environ)
        assert caught.value.message == "KVD_EVENTS__WORKERS: a list is given as JSON"


def test_snapshots_are_asked_for_beside_the_events() -> None:
    for endpoint, replay in (
        ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558"),
        ("tcp://[::1]:5557", "tcp://[::1]:5558"),
        ("ipc:///run/kvd/kvd.events", "ipc:///run/kvd/kvd.events.replay"),
    ):
        assert load_daemon_settings(None, {}).events.model_copy(update={"endpoint": endpoint}).replay == replay


def test_the_routers_variables_are_the_routers_business() -> None:
    with_routers = load_daemon_settings(None, {"KVD_ROUTER_LISTEN__PORT": "1", "KVD_ROUTER_NONSENSE": "x"})
    assert with_routers == load_daemon_settings(None, {})


def test_a_file_that_is_no_text_is_not_toml(tmp_path: Path) -> None:
    file = tmp_path / "kvd.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="is not TOML"):
        load_daemon_settings(file, {})


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(SettingsError, match="KVD_ARENA_SIZE"):
        load_daemon_settings(None, {"KVD_ARENA_SIZE": "5"})


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"/nowhere/kvd\.toml"):
        load_daemon_settings(Path("/nowhere/kvd.toml"), {})


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"KVD_NONSENSE": "1"}, "KVD_NONSENSE"),
        ({"KVD_RUN_DIR": "/proc/nowhere"}, "/proc/nowhere"),
        ({"KVD_ARENA__PATH": "/nowhere/x.arena"}, "/nowhere/x.arena"),
        ({"KVD_ARENA__SIZE_BYTES": str(1 << 50)}, "MiB left"),
    ],
)
def test_kvd_itself_ends_with_78_and_one_line(tmp_path: Path, variables: dict[str, str], says: str) -> None:
    env = {"PATH": "/usr/bin", "KVD_RUN_DIR": str(tmp_path / "run"), **variables}
    done = subprocess.run([sys.executable, "-m", "kvd.main"], env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 78
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_an_example_has_one_of_a_list_of_tables_and_no_default_where_there_is_none() -> None:
    class Part(BaseModel):
        where: str = Field(description="its place")

    class Whole(BaseModel):
        words: list[str] = Field([], description="some")
        parts: list[Part] = Field([], description="as many as there are")

    assert described(Whole) == [
        "# some", "# words = []", "", "# as many as there are", "# [[parts]]", "", "# its place", "# where = ...", "",
    ]  # fmt: skip


def test_the_example_is_what_the_settings_say(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "deploy/kvd.toml").read_text()
    assert text == example(), "run: kvd --example-config > deploy/kvd.toml"
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    lines = [line for line in lines if " = " in line or line.startswith("[")]
    uncommented = tmp_path / "kvd.toml"
    # without a default, or no setting at all
    bursts = ("ram_burst", "nvme_burst", "shared_burst")
    unset = (
        "path",
        "mount_point",
        "uri",
        "ttl_s",
        "pins_file",
        "endpoint",
        "replay_endpoint",
        *bursts,
        "kvd's settings",
    )
    uncommented.write_text("\n".join(line for line in lines if not line.startswith(unset)))
    settings = load_daemon_settings(uncommented, {})
    assert settings.tenants == {"NAME": TenantSettings()}
    defaults = {"run_dir": Path("/run/kvd"), "tenants": settings.tenants}
    assert settings == load_daemon_settings(None, {}).model_copy(update=defaults)
