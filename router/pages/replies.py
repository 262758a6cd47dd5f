"""What the router's pages say, as types: the router writes them, kvdctl reads them. Pure.

Times are seconds, prompts and prefixes tokens. Fields are added last and with a default, so that a kvdctl of another
version still reads them. None is not known, or not yet.
"""

import msgspec


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Of one process of the router; `processes` share the port, and each knows what it did itself."""

    pid: int = 0
    processes: int = 1


class Candidate(msgspec.Struct, frozen=True):
    """A worker that could have taken the request. `terms` are what `cost` was made of, as its policy names them."""

    worker: str
    matched: dict[str, int]  # leading tokens of the prompt by tier: gpu, ram, nvme, shared, expected
    cost: float
    terms: dict[str, float]
    ttft_s: float | None = None  # where the policy predicts it: then cost and terms are seconds too
    running: int = 0
    queued: int = 0
    queued_tokens: int = 0


class Decision(msgspec.Struct, frozen=True):
    """Where one request went, and what came of it. `ranked`: the best candidates, the chosen one first."""

    request: str
    age_s: float
    policy: str
    tokens: int
    worker: str
    why: str  # it won, in a sentence
    ranked: list[Candidate]
    candidates: int  # how many there were
    predicted_ttft_s: float | None = None
    actual_ttft_s: float | None = None
    cached_tokens: int | None = None  # as the engine says
    took_s: float | None = None  # from the choice to the end
    outcome: str = ""
    unknown: str = ""  # why no tokens could be made of it: `tokens` is a guess then


class Decisions(Reply, frozen=True):
    """The newest first; `total` were made since the router started, the last `kept` are remembered."""

    decisions: list[Decision] = []
    total: int = 0
    kept: int = 0


class Recent(msgspec.Struct, frozen=True):
    """Of the requests that a worker was sent within `within_s`. Sums and counts, so that processes can be added."""

    within_s: float = 0.0
    requests: int = 0
    counted: int = 0  # those whose engine said what was cached
    tokens: int = 0  # of their prompts
    cached_tokens: int = 0
    timed: int = 0  # those with both times to first token
    predicted_ttft_s: float = 0.0  # their sum
    actual_ttft_s: float = 0.0


class Worker(msgspec.Struct, frozen=True):
    """`credit`: requests are sent there for what it has cached; if not, `why` and the `remedy` say what is missing."""

    name: str
    state: str  # joining, serving, draining, unhealthy, gone
    credit: bool
    model: str = ""
    node: str = ""
    why: str = ""
    remedy: str = ""
    running: int = 0
    queued: int = 0
    queued_tokens: int = 0
    connections: int = 0
    recent: Recent = Recent()
    health: str = ""  # what is wrong with it; empty where it is well
    parity: str = "unknown"  # "equal" or "differs": its tokens and the router's
    origin: str = ""  # configured, added (by an operator), announced (by its node)


class Workers(Reply, frozen=True):
    """`waiting` requests are in the router's own queue, because all workers have enough."""

    policy: str = ""
    workers: list[Worker] = []
    waiting: int = 0
    version: str = ""


class Ledger(Reply, frozen=True):
    """Tokens: of all prompts; of those that a cache of any size would have had; that were had; and lost, by cause.

    available = achieved + all lost. `percent`: available of all tokens, the others of those available.
    """

    requests: int = 0
    given_up: int = 0  # requests whose answers never said how much was cached
    tokens: int = 0
    available: int = 0
    achieved: int = 0
    lost: dict[str, int] = {}
    percent: dict[str, float] = {}


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What POST /kvd/workers/add, drain and remove take."""

    worker: str


class Changed(Reply, frozen=True):
    worker: str = ""
    done: str = ""


class Problem(msgspec.Struct, frozen=True):
    message: str
    hint: str = ""


class Failed(msgspec.Struct, frozen=True):
    """Any other status than 200, in the shape of the API's errors."""

    error: Problem
