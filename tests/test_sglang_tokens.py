"""A real SGLang worker's own endpoints: parity, the tokens it counts, and the hashes it would announce for them."""

import asyncio
import json
from typing import Any

import pytest

from kvd import sglang_info
from kvd.router.asking import Asker
from kvd.router.fleet.loads import PATH as LOADS
from kvd.router.fleet.loads import report
from kvd.router.fleet.told import Told
from kvd.router.steering import Worker
from kvd.router.tokens.parity import Verdict
from kvd.router.tokens.probe import Probe
from kvd.router.tokens.requests import CHAT, Tokeniser
from tests.sglang_node import PAGE_TOKENS, SERVED_AS, needs_sglang, worker
from tests.test_router_prompts import CASES
from tools.demo.node import MODEL

pytestmark = [needs_sglang, pytest.mark.slow, pytest.mark.timeout(600)]


async def verdict_of(port: int, tokeniser: Tokeniser) -> Verdict:
    asker = Asker(Worker("sglang", "127.0.0.1", port))
    try:
        return await Probe(asker, tokeniser).once()
    finally:
        asker.close()


def test_a_real_worker_is_equal_and_counts_the_same_prompt_tokens() -> None:
    with worker("tokens", None) as server:
        info = server.request("GET", "/server_info")
        told = Told.of(info.encode())
        assert len(told.life) == 32
        assert told.life == sglang_info.life(json.loads(server.request("GET", "/server_info")))
        assert (told.block_tokens, told.serving.served_name) == (PAGE_TOKENS, SERVED_AS)
        assert min(told.most_tokens, told.token_bytes) > 0
        load = report(server.request("GET", LOADS).encode(), 100.0)
        assert (load.running, load.waiting, load.waiting_tokens, load.most_tokens) == (0, 0, 0, told.most_tokens)
        assert 0 < load.made_at <= 100.0
        tokeniser = Tokeniser.open(MODEL, told.serving)
        verdict = asyncio.run(verdict_of(server.port, tokeniser))
        assert verdict.state == "equal", verdict
        compared = 0
        for path, body in CASES:
            ids = tokeniser.tokenise(path, body)[0].ids
            if path != CHAT or ids is None or len(ids) > 1000:
                continue
            answer: dict[str, Any] = json.loads(
                server.request("POST", CHAT, {**body, "max_tokens": 1, "stream": False})
            )
            assert answer["usage"]["prompt_tokens"] == len(ids), body
            given = {name: value for name, value in body.items() if name not in ("stream", "cache_salt", "extra_key")}
            assert json.loads(server.request("POST", "/tokenize", given))["tokens"] == list(ids), body
            compared += 1
        assert compared > 30
        tokeniser.close()
