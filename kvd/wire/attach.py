"""Joining kvd: registration with its descriptors, liveness, what a worker reports."""

from typing import Literal

from kvd.wire.base import Message


class Hello(Message, tag="hello", frozen=True):
    """First frame of a connection. A worker sends its lease table's descriptor along with it."""

    protocol: int
    role: Literal["worker", "tool"]
    label: str


class NamespaceSpec(Message, tag="ns", frozen=True):
    """One pool of one rank: what it stores and which shard of each page it holds."""

    digest: bytes
    page_bytes: int
    page_tokens: int
    shard: int
    shards: int
    pool: str
    label: str
    family: bytes = b""  # equal for pools of one model whose pages belong together
    scratch: bool = False  # its pages leave with the session; refused where anybody else has the namespace
    tenant: str = ""  # whose quota its pages count against


class Join(Message, tag="join", frozen=True):
    """Announce namespaces; the reply's ids are valid for this connection only."""

    namespaces: list[NamespaceSpec]
    server: str = ""  # whose rank this is: see kvd.sglang_info


class Ping(Message, tag="ping", frozen=True):
    n: int


class Report(Message, tag="report", frozen=True):
    """What the plugin saw since it started: counters only grow. Not answered."""

    circuit: str
    counters: dict[str, int]


class Welcome(Message, tag="welcome", frozen=True):
    """Carries two descriptors: the arena and the index."""

    protocol: int
    epoch: int
    session: int
    ticket: bytes
    data_endpoint: str
    arena_bytes: int
    index_bytes: int
    version: str


class Joined(Message, tag="joined", frozen=True):
    ids: list[int]


class Pong(Message, tag="pong", frozen=True):
    """`faulted_bytes` of the arena exist by now: a worker may map them without being charged for them."""

    n: int
    faulted_bytes: int = 0


class Refusal(Message, tag="refusal", frozen=True):
    """The request was understood and refused."""

    reason: str
    hint: str = ""
    request: int = 0
