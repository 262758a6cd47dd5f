"""What an operator can set. One frozen class per program; unknown keys are refused; nothing is corrected silently.

The daemon reads, later ones winning: defaults, a TOML file (`--config`, else /etc/kvd/kvd.toml if it is there), the
environment (`KVD_ARENA__SIZE_BYTES=...`). Read once, in `main`. The plugin has no file: its settings are the keys
of SGLang's --hicache-storage-backend-extra-config, see kvd.sidecar.config.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvd.places import replay_endpoint, run_dir
from kvd.settingsfile import NODE, described, load

DEFAULT_FILE = Path("/etc/kvd/kvd.toml")
_STRICT = ConfigDict(frozen=True, extra="forbid")
MIB = 1 << 20
_ENDPOINT = re.compile(r"tcp://[^\s/]+:[1-9]\d{0,4}|ipc:///\S+")


class ArenaSettings(BaseModel):
    """The RAM tier."""

    model_config = _STRICT

    size_bytes: int = Field(2048 * MIB, description="memory kvd keeps pages in; taken for good at start")
    extent_bytes: int = Field(64 * MIB, description="unit handed to one page size; at least twice the largest page")
    path: Path | None = Field(None, description="where the memory lives without systemd; a file on tmpfs")
    keep_on_stop: bool = Field(False, description="keep the file after a clean stop too (it always survives a crash)")
    prefault: bool = Field(True, description="touch all memory at start; off: the first write of a page is 8x slower")
    lock: bool = Field(False, description="mlock the memory; needs a memlock limit above size_bytes")
    ttl_s: float | None = Field(None, gt=0, description="how long a page stays unused; unset: until room is needed")

    @model_validator(mode="after")
    def _consistent(self) -> "ArenaSettings":
        if self.extent_bytes % 4096 or not MIB <= self.extent_bytes < 1 << 32:
            raise ValueError("extent_bytes must be a multiple of 4096, at least 1 MiB and below 4 GiB")
        if self.size_bytes < self.extent_bytes:
            raise ValueError("size_bytes must hold at least one extent")
        return self

    @property
    def extents(self) -> int:
        return self.size_bytes // self.extent_bytes


class NvmeSettings(BaseModel):
    """The tier on a local disk; off unless it has a path."""

    model_config = _STRICT

    path: Path | None = Field(None, description="folder on a local NVMe disk, kvd's alone; unset: no such tier")
    mount_point: Path | None = Field(
        None, description="where that disk is mounted; nothing is written while it is not. Unset: not looked at"
    )
    size_bytes: int = Field(64 << 30, ge=MIB, description="disk space it may take; taken as needed, for good")
    segment_bytes: int = Field(256 * MIB, description="size of its files; each holds pages of one size")
    threads: int = Field(4, ge=1, le=64, description="reads and writes in flight")
    write_delay_s: float = Field(1.0, ge=0, le=600, description="how long a new page waits to be written with others")
    ttl_s: float | None = Field(None, gt=0, description="how long a page stays unused; unset: until room is needed")

    @model_validator(mode="after")
    def _consistent(self) -> "NvmeSettings":
        if self.segment_bytes % 4096 or not MIB <= self.segment_bytes < 1 << 32:
            raise ValueError("segment_bytes must be a multiple of 4096, at least 1 MiB and below 4 GiB")
        if self.size_bytes < self.segment_bytes:
            raise ValueError("size_bytes must hold at least one segment")
        if self.mount_point is not None and not (self.path and self.path.is_relative_to(self.mount_point)):
            raise ValueError("mount_point must be path or a folder above it")
        return self


class SharedSettings(BaseModel):
    """The tier that several nodes share; off unless it has a URI."""

    model_config = _STRICT

    uri: str | None = Field(None, description="a folder (also on NFS) or s3://bucket/path; unset: no such tier")
    node: str = Field("", description="this node's name there, unlike any other's; empty: the host name")
    quota_bytes: int = Field(1 << 40, ge=MIB, description="of all nodes together: give them the same")
    file_bytes: int = Field(128 * MIB, ge=MIB, description="what its files grow to")
    poll_s: float = Field(5.0, gt=0, le=3600, description="how often to look for what other nodes stored")
    ttl_s: float | None = Field(None, gt=0, description="how long a page is kept; unset: until the quota needs room")
    threads: int = Field(4, ge=1, le=64, description="reads in flight")
    write_delay_s: float = Field(10.0, ge=0, le=600, description="how long a new page waits to be written with others")


class EventSettings(BaseModel):
    """The node's stream of prefix events, for routers; off unless it has an endpoint."""

    model_config = _STRICT

    endpoint: str | None = Field(
        None, description="where routers subscribe: tcp://ADDRESS:PORT or ipc:///PATH; unset: no stream"
    )
    replay_endpoint: str | None = Field(
        None, description="where they ask for snapshots; unset: the next port, or the path with .replay"
    )
    plain: bool = Field(False, description="needed where other machines reach it: anybody there can read the hashes")
    node: str = Field("", description="this node's name there, unlike any other's; empty: the host name")
    workers: tuple[str, ...] = Field(
        (), description="URLs of this node's SGLang workers, which say in /server_info where they publish"
    )
    replay_batches: int = Field(10_000, ge=1, description="how much a router may miss before it needs a snapshot")
    most_blocks: int = Field(
        4_000_000, ge=1, description="of one medium of a rank, and of all kvd's tiers; each takes about 150 bytes"
    )

    @property
    def replay(self) -> str:
        """Where replays and snapshots are asked for."""
        return self.replay_endpoint or replay_endpoint(self.endpoint or "")

    @model_validator(mode="after")
    def _consistent(self) -> "EventSettings":
        for endpoint in filter(None, (self.endpoint, self.replay_endpoint)):
            if not _ENDPOINT.fullmatch(endpoint):
                raise ValueError(f"{endpoint} is neither tcp://ADDRESS:PORT nor ipc:///PATH")
            if (
                not endpoint.startswith(("ipc://", "tcp://127.", "tcp://localhost:", "tcp://[::1]:"))
                and not self.plain
            ):
                raise ValueError(
                    f"{endpoint} is open to other machines, unencrypted: set events.plain if that is meant"
                )
        for url in self.workers:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"workers: {url} is not a URL such as http://127.0.0.1:30000")
        if self.endpoint is None and (self.workers or self.replay_endpoint):
            raise ValueError("workers and replay_endpoint are of no use without endpoint")
        return self


class TenantSettings(BaseModel):
    """What workers that give this `tenant` are entitled to in the tiers of a node."""

    model_config = _STRICT

    ram_reserve_bytes: int = Field(0, ge=0, description="others do not push it below this")
    ram_burst_bytes: int | None = Field(None, ge=0, description="above this it loses pages first; unset: no limit")
    nvme_reserve_bytes: int = Field(0, ge=0, description="the same on the local disk")
    nvme_burst_bytes: int | None = Field(None, ge=0, description="the same on the local disk")
    shared_reserve_bytes: int = Field(0, ge=0, description="the same in the shared tier; give all nodes the same")
    shared_burst_bytes: int | None = Field(
        None, ge=0, description="the same in the shared tier; give all nodes the same"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TenantSettings":
        pairs = (
            (self.ram_reserve_bytes, self.ram_burst_bytes),
            (self.nvme_reserve_bytes, self.nvme_burst_bytes),
            (self.shared_reserve_bytes, self.shared_burst_bytes),
        )
        if any(burst is not None and reserve > burst for reserve, burst in pairs):
            raise ValueError("a reserve must not be above the burst of the same tier")
        return self


class DaemonSettings(BaseSettings):
    """Settings of `kvd`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="KVD_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    run_dir: Path = Field(
        default_factory=lambda: run_dir(os.environ, os.getuid()), description="folder of the sockets"
    )
    arena: ArenaSettings = ArenaSettings()
    nvme: NvmeSettings = NvmeSettings()
    shared: SharedSettings = SharedSettings()
    events: EventSettings = EventSettings()
    tenants: dict[str, TenantSettings] = Field({}, description="shares of tenants; who is not named has no limit")
    pins_file: Path | None = Field(None, description="where pins are kept; unset: run_dir, which a reboot may empty")
    socket_mode: int = Field(0o660, description="permission of the sockets: who may use the cache")
    max_sessions: int = Field(256, ge=1, le=4096, description="worker ranks and tools connected at once")
    flush_s: float = Field(10.0, ge=0, le=80, description="how long a clean stop may write what tiers do not have yet")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what goes to stderr")

    @property
    def pins_path(self) -> Path:
        return self.pins_file or self.run_dir / "pins"

    @model_validator(mode="after")
    def _reserves_fit(self) -> "DaemonSettings":
        shares = self.tenants.values()
        for name, size, reserves in (
            ("arena.size_bytes", self.arena.size_bytes, [share.ram_reserve_bytes for share in shares]),
            ("nvme.size_bytes", self.nvme.size_bytes, [share.nvme_reserve_bytes for share in shares]),
            ("shared.quota_bytes", self.shared.quota_bytes, [share.shared_reserve_bytes for share in shares]),
        ):
            if sum(reserves) > size:
                raise ValueError(f"the tenants' reserves are {sum(reserves)} bytes, {name} is {size}")
        return self


def load_daemon_settings(file: Path | None, environ: Mapping[str, str]) -> DaemonSettings:
    """Read the file and the environment. Raises SettingsError naming the key and the remedy."""
    if file is None and DEFAULT_FILE.exists():
        file = DEFAULT_FILE
    return load(DaemonSettings, NODE, file, environ)


def example() -> str:
    """deploy/kvd.toml: every setting with its default and what it does, commented out."""
    shown = {"run_dir": '"/run/kvd"', "socket_mode": "0o660"}
    lines = [
        "# kvd's settings, with their defaults. Or as variables: KVD_MAX_SESSIONS=..., KVD_ARENA__SIZE_BYTES=...",
        "",
        *described(DaemonSettings, shown),
        *("# What the tenant NAME is entitled to; any number of such sections.", "# [tenants.NAME]", ""),
        *described(TenantSettings),
    ]
    return "\n".join(lines).rstrip() + "\n"
