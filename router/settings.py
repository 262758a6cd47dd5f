"""What an operator can set of the router. Frozen; unknown keys are refused; nothing is corrected silently.

Read, later ones winning: defaults, a TOML file (`--config`, else /etc/kvd/router.toml if it is there), the environment
(`KVD_ROUTER_LISTEN__PORT=...`), the command line. Read once, in `main`.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvd.errors import SettingsError
from kvd.places import replay_endpoint
from kvd.router.fleet.fleet import Options
from kvd.router.fleet.nodes import NodeAt
from kvd.router.policies.named import Name
from kvd.router.proxy.house import Limits
from kvd.router.steering import Worker, worker_at
from kvd.router.tenants import Tenants
from kvd.settingsfile import ROUTER, described, load, read, read_toml

DEFAULT_FILE = Path("/etc/kvd/router.toml")
_STRICT = ConfigDict(frozen=True, extra="forbid")
MIB = 1 << 20
KEY = re.compile(rb"[\x21-\x7e]+")
_ENDPOINT = re.compile(r"tcp://[^\s/]+:[1-9]\d{0,4}|ipc:///\S+")


class ListenSettings(BaseModel):
    """Where clients connect."""

    model_config = _STRICT

    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of this machine's")
    port: int = Field(30080, ge=0, le=65535, description="0: any that is free, said in the log")
    processes: int = Field(1, ge=1, le=64, description="processes that share the port; each chooses for itself")
    clients: int = Field(4096, ge=1, description="connections at once, of each process")


class LimitSettings(BaseModel):
    """What one request may take. Beyond it: 408, 413, 431, 503."""

    model_config = _STRICT

    head_bytes: int = Field(32 << 10, ge=1024, le=MIB, description="of all headers of a request")
    body_bytes: int = Field(64 * MIB, ge=1024, description="of a request's body; images are sent in it")
    bodies_bytes: int = Field(512 * MIB, ge=1024, description="of all bodies at once, of each process")
    head_s: float = Field(10.0, gt=0, description="for all headers to arrive")
    body_s: float = Field(60.0, gt=0, description="for all of the body to arrive")
    idle_s: float = Field(75.0, gt=0, description="how long a connection stays open between requests")
    send_s: float = Field(60.0, gt=0, description="how long a client may not read what it asked for")
    silence_s: float = Field(600.0, gt=0, description="how long a worker may say nothing before it counts as lost")
    connect_s: float = Field(2.0, gt=0, description="for a worker to accept a connection")

    @model_validator(mode="after")
    def _consistent(self) -> "LimitSettings":
        if self.body_bytes > self.bodies_bytes:
            raise ValueError("bodies_bytes must hold at least one body")
        return self


class QueueSettings(BaseModel):
    """What happens when all workers are busy."""

    model_config = _STRICT

    each: int = Field(256, ge=1, description="requests a worker is given at once; more wait here, where shares count")
    waiting: int = Field(1024, ge=0, description="requests that may wait; then 503, or 429 for who has most waiting")
    seconds: float = Field(
        30.0, gt=0, description="how long a request waits at most; x-kvd-timeout-s may ask for less"
    )


class RoutingSettings(BaseModel):
    """How a worker is chosen."""

    model_config = _STRICT

    policy: Name = Field(
        "kvd", description="kvd: the least expected waiting; others, to compare with: router/policies"
    )


class TenantSettings(BaseModel):
    """API keys."""

    model_config = _STRICT

    keys_file: Path | None = Field(None, description="TOML, one [NAME] per tenant; unset: no key is needed")
    secret_file: Path | None = Field(None, description="what tenants' salts are made of; the same for all routers")

    @model_validator(mode="after")
    def _consistent(self) -> "TenantSettings":
        if self.secret_file is not None and self.keys_file is None:  # who set it does not want it open to everybody
            raise ValueError("secret_file without keys_file: no key would be needed, set both or neither")
        return self


class NodeSettings(BaseModel):
    """A node whose kvd tells what its workers and its own tiers hold: its `events` settings."""

    model_config = _STRICT

    events: str = Field(description="its events.endpoint, as reached from here: tcp://HOST:PORT or ipc:///PATH")
    replay: str | None = Field(
        None, description="its events.replay_endpoint; unset: the next port, or the path with .replay"
    )

    @field_validator("events", "replay")
    @classmethod
    def _is_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            raise ValueError(f"{endpoint} is neither tcp://HOST:PORT nor ipc:///PATH")
        return endpoint

    @model_validator(mode="after")
    def _has_ports(self) -> "NodeSettings":
        for endpoint in self.at:
            if endpoint.startswith("tcp://") and int(endpoint.rpartition(":")[2]) > 0xFFFF:
                raise ValueError(f"{endpoint}: there is no such port")
        return self

    @property
    def at(self) -> NodeAt:
        return NodeAt(self.events, self.replay or replay_endpoint(self.events))


class RouterSettings(BaseSettings):
    """Settings of `kvd-router`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ROUTER,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    workers: list[str] = Field([], description="SGLang servers: http://HOST:PORT each")
    nodes: list[NodeSettings] = Field(
        [], description="kvd daemons to follow, one [[nodes]] each; else nobody tells what workers hold"
    )
    join_announced: bool = Field(True, description="the nodes' workers join by themselves, and leave with them")
    model_path: Path | None = Field(
        None, description="folder with the workers' tokenizer; unset: as they say, else the Hugging Face cache"
    )
    index_blocks: int = Field(
        8_000_000, ge=1000, description="of all workers and tiers that are known at once; up to 120 bytes each"
    )
    worker_key_file: Path | None = Field(None, description="the workers' --api-key; unset: they need none")
    listen: ListenSettings = ListenSettings()
    limits: LimitSettings = LimitSettings()
    queue: QueueSettings = QueueSettings()
    routing: RoutingSettings = RoutingSettings()
    tenants: TenantSettings = TenantSettings()
    drain_s: float = Field(60.0, ge=0, le=3600, description="how long a clean stop waits for answers in progress")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what goes to stderr")

    @field_validator("workers")
    @classmethod
    def _are_urls(cls, workers: list[str]) -> list[str]:
        if twice := _twice([worker_at(url).name for url in workers]):
            raise ValueError(f"{twice} is there twice")
        return workers

    @model_validator(mode="after")
    def _has_workers(self) -> "RouterSettings":
        if not self.workers and not (self.nodes and self.join_announced):
            raise ValueError('workers: at least one is needed, for instance ["http://127.0.0.1:30000"], or nodes')
        if twice := _twice([node.events for node in self.nodes]):
            raise ValueError(f"nodes: {twice} is there twice")
        return self

    def read_workers(self) -> dict[str, Worker]:
        """By name."""
        return {worker.name: worker for worker in map(worker_at, self.workers)}

    def read_fleet(self) -> Options:
        """Raises SettingsError."""
        if self.model_path is not None and not (self.model_path / "tokenizer.json").is_file():
            raise SettingsError(f"no tokenizer.json in {self.model_path}", "set model_path to the model's folder")
        return Options(
            [node.at for node in self.nodes], self.model_path, self.join_announced, self.index_blocks,
            self.read_worker_key(),
        )  # fmt: skip

    def read_limits(self) -> Limits:
        return Limits(clients=self.listen.clients, queue_s=self.queue.seconds, **self.limits.model_dump())

    def read_tenants(self) -> Tenants:
        """From the files. Raises SettingsError."""
        secret = read(self.tenants.secret_file, "tenants.secret_file").strip() if self.tenants.secret_file else b""
        if self.tenants.keys_file is None:
            return Tenants([], secret)
        sections = read_toml(self.tenants.keys_file, "tenants.keys_file")
        if not sections:
            raise SettingsError(f"{self.tenants.keys_file} names no tenant", "then nobody could use the router")
        return Tenants.read(sections, secret)

    def read_worker_key(self) -> bytes | None:
        """From the file. Raises SettingsError."""
        if self.worker_key_file is None:
            return None
        key = read(self.worker_key_file, "worker_key_file").rstrip(b"\r\n")
        if not KEY.fullmatch(key):  # it goes into a header as it is: a second line would be a header of its own
            raise SettingsError(
                f"worker_key_file {self.worker_key_file} does not hold one API key",
                "write the workers' --api-key there, alone on one line: ASCII, no spaces; or unset worker_key_file",
            )
        return key


def _twice(names: list[str]) -> str:
    """Those that are there more than once."""
    return ", ".join(name for name, times in Counter(names).items() if times > 1)


def load_router_settings(file: Path | None, environ: Mapping[str, str], given: Mapping[str, Any]) -> RouterSettings:
    """Read file and environment; `given` wins over both. Raises SettingsError naming the key and the remedy."""
    if file is None and DEFAULT_FILE.exists():
        file = DEFAULT_FILE
    return load(RouterSettings, ROUTER, file, environ, given)


def example() -> str:
    """deploy/router.toml: every setting with its default and what it does, commented out."""
    lines = [
        "# kvd-router's settings, with their defaults. Or as variables: KVD_ROUTER_DRAIN_S=..., "
        "KVD_ROUTER_LISTEN__PORT=...",
        "",
        *described(RouterSettings),
    ]
    return "\n".join(lines).rstrip() + "\n"
