"""Which worker answers at a URL, and where it publishes its KV events: its own answer to `GET /server_info`."""

import urllib.error
import urllib.request
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from kvd import sglang_info
from kvd.errors import UNDECODABLE, PeerError, Unavailable

_MOST_BYTES = 4 << 20
MOST_RANKS = 256
_WILDCARDS = ("", "*", "0.0.0.0", "::", "[::]")
_HINT = 'start it with --kv-events-config \'{"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":...}\''


class Address(NamedTuple):
    """One rank's publisher."""

    rank: int
    events: str
    replay: str | None
    topic: str
    block_tokens: int


class _KvEvents(msgspec.Struct):
    endpoint_port_base: int
    endpoint_host: str = "*"
    topic: str = ""
    block_size: int = 0
    dp_size: int = 1
    replay_endpoint_port_base: int | None = None


class _ServerInfo(msgspec.Struct):
    kv_events: _KvEvents | None = None


def server_info(url: str, timeout_s: float) -> bytes:
    """What the worker at this URL says of itself, as JSON. Blocks. Raises Unavailable."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/server_info", timeout=timeout_s) as answer:
            return bytes(answer.read(_MOST_BYTES))
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise Unavailable(f"{url} does not answer /server_info: {error}", "is the worker running there?") from error


class Identity(NamedTuple):
    """Which worker this is: see kvd.sglang_info."""

    server: str
    life: str


def identity(info: bytes) -> Identity:
    """Both "" where the answer is not understood."""
    try:
        told = msgspec.json.decode(info)
    except UNDECODABLE:
        told = None
    return Identity(sglang_info.server(told), sglang_info.life(told))


def addresses(url: str, info: bytes) -> list[Address]:
    """The publishers of all its ranks. Raises PeerError where it has none, or says so in another way."""
    try:
        found = msgspec.json.decode(info, type=_ServerInfo).kv_events
    except UNDECODABLE as error:
        raise PeerError(f"{url}/server_info is not understood: {error}", "is this an SGLang worker?") from error
    if found is None:
        raise PeerError(f"{url} publishes no KV events that can be dialled", _HINT)
    last = max(found.endpoint_port_base, found.replay_endpoint_port_base or 0) + found.dp_size - 1
    if not 1 <= found.dp_size <= MOST_RANKS or not 0 < found.endpoint_port_base <= last <= 0xFFFF:
        raise PeerError(f"{url} names impossible ports: {found}", _HINT)
    host = urlsplit(url).hostname or ""
    if found.endpoint_host not in _WILDCARDS:
        host = found.endpoint_host.strip("[]")
    if ":" in host:
        host = f"[{host}]"
    replay = found.replay_endpoint_port_base
    return [
        Address(
            rank, f"tcp://{host}:{found.endpoint_port_base + rank}",
            f"tcp://{host}:{replay + rank}" if replay else None, found.topic, found.block_size,
        )
        for rank in range(found.dp_size)
    ]  # fmt: skip
