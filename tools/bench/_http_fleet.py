"""Mock workers that get prefix credit, as far as a router can tell: for the benchmark of routing by tokens.

Each says what it is (/server_info), makes the very tokens of its model (/tokenize answers the canaries, with what was
made here before), tells its load, and publishes KV events: a scripted publisher speaks for it. A real kvd follows
those and publishes the node's stream. What they hold does not change under load: what events cost a router,
router_index.py measures.
"""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvd.router.fleet.told import Told
from kvd.router.tokens.parity import Canary, canaries
from kvd.router.tokens.requests import CHAT, Tokeniser
from tests.event_stream import ScriptedWorker
from tests.fleet_harness import describes, node
from tests.harness import eventually
from tests.router_harness import free_port
from tools.bench._http import WORKERS, Running, Tools, mock
from tools.bench._http_chats import Conversation, begun

BLOCK_TOKENS = 64
_CREDIT_S = _PAGE_S = 60.0  # on a machine that is busy with other things
_LAST = 200  # decisions that are looked at


@dataclass(frozen=True, slots=True)
class Fleet:
    """`events`: where their node publishes. `backend`: what makes a router's tokens."""

    ports: Sequence[int]
    events: str
    backend: str


@contextmanager
def credited(tools: Tools, folder: Path, model: Path, held: Sequence[Conversation]) -> Iterator[Fleet]:
    """The workers hold what of these conversations is there before they go on: each one of them, in turn."""
    with ExitStack() as stack:
        publishers = [stack.enter_context(ScriptedWorker()) for _ in range(WORKERS)]
        ports = [free_port() for _ in publishers]
        infos = [_info(model, port, publisher) for port, publisher in zip(ports, publishers, strict=True)]
        told = Told.of(msgspec.json.encode(infos[0]))
        tokeniser = Tokeniser.open(model, told.serving)
        stack.callback(tokeniser.close)
        asked = _canaries(tokeniser)
        for port, info in zip(ports, infos, strict=True):
            table = folder / f"answers-{port}.tsv"
            table.write_bytes(b"GET /server_info\t\t%b\n" % msgspec.json.encode(info) + asked)
            stack.enter_context(mock(tools, port, table))
        for number, conversation in enumerate(held):
            hashes, ids = _known(tokeniser, told, conversation)
            publishers[number % WORKERS].do("store", *hashes, block=BLOCK_TOKENS, tokens=ids)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        _, at = stack.enter_context(node(*urls))
        yield Fleet(ports, at.events, tokeniser.encoder.backend.name)


def await_credit(router: Running) -> None:
    """Until it steers by what every worker holds. Raises AssertionError, which says what is missing."""
    workers: list[dict[str, Any]] = []

    def credited() -> bool:
        workers[:] = _page(router, "workers")["workers"]
        return [worker["credit"] for worker in workers] == [True] * WORKERS

    try:
        eventually(credited, _CREDIT_S)
    except AssertionError:
        raise AssertionError(f"no prefix credit: { {worker['name']: worker['why'] for worker in workers} }") from None


def matched(router: Running) -> tuple[float, float]:
    """Of its last decisions' tokens, the shares that the chosen workers had, by events alone and with what was sent.

    Raises AssertionError where any request since it started was steered without tokens, or with other workers' ones.
    """
    with urllib.request.urlopen(f"http://127.0.0.1:{router.port}/kvd/metrics", timeout=_PAGE_S) as reply:
        lines = [line.rpartition(" ") for line in reply.read().decode().splitlines() if "_prompts_total{" in line]
    counts = {name: float(value) for name, _, value in lines}
    assert len(counts) == 1, f"requests without tokens: {counts}"
    assert 'tokens="tokens"' in next(iter(counts)), f"requests without tokens: {counts}"
    decisions = _page(router, f"decisions?last={_LAST}")["decisions"]
    assert decisions, "no request was steered"
    chosen = [decision["ranked"][0]["matched"] for decision in decisions]
    tokens = sum(decision["tokens"] for decision in decisions)
    return sum(one["gpu"] for one in chosen) / tokens, sum(max(one.values()) for one in chosen) / tokens


def _info(model: Path, port: int, publisher: ScriptedWorker) -> dict[str, Any]:
    start = {"startup_time": {"load_weight": port / 7}}
    return describes(
        model, publisher, BLOCK_TOKENS, served_model_name="mock", port=port, random_seed=port,
        internal_states=[start], max_total_num_tokens=1 << 22, version="0.5.23",
    )  # fmt: skip


def _canaries(tokeniser: Tokeniser) -> bytes:
    """The table's lines for them."""

    def ids(canary: Canary) -> Sequence[int]:
        if canary.chat:
            return tokeniser.tokenise(CHAT, canary.body)[0].ids or []
        return tokeniser.text(str(canary.body["prompt"]))

    return b"".join(
        b"POST /tokenize\t%b\t%b\n"
        % (msgspec.json.encode(canary.body), json.dumps({"tokens": list(ids(canary))}).encode())
        for canary in canaries(tokeniser.special_tokens)
    )


def _known(tokeniser: Tokeniser, told: Told, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Hashes and tokens of the blocks that its first request has whatever its number is."""
    prompt, same = (tokeniser.tokenise(CHAT, begun(conversation[0], number))[0] for number in (0, (1 << 64) - 1))
    one, other = tokeniser.hashes(prompt, told.scheme), tokeniser.hashes(same, told.scheme)
    pairs = zip(one, other, strict=False)
    blocks = next((at for at, (mine, its) in enumerate(pairs) if mine != its), len(one))
    return one[:blocks], list(prompt.ids or ())[: blocks * BLOCK_TOKENS]


def _page(router: Running, name: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{router.port}/kvd/{name}", timeout=_PAGE_S) as reply:
        said: dict[str, Any] = json.load(reply)
        return said
