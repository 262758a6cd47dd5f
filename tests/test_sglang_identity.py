"""Who shares pages with whom, seen with real SGLang workers on one kvd: the same thing always, different things never.

The page keys of all these workers are equal for equal prompts, and so is the name they serve their model under. Only
kvd's namespaces keep them apart. Pages of 16 tokens, prompts of 130.
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest

from kvd import wire
from kvd.pages import chain, seed
from tests.harness import Daemon, eventually
from tests.sglang_node import (
    ask,
    fill,
    needs_sglang,
    other_revision,
    pages_held,
    plugin_ready,
    reusable,
    running,
    salt,
    words,
    worker,
)
from tools.demo.node import VENV
from tools.sglang_cpu.server import SglangServer
from tools.sglang_cpu.setup_env import environment_of

pytestmark = [needs_sglang, pytest.mark.timeout(600)]

PAGE_TOKENS = 16
PROMPTS = [words(500 + number, 130) for number in range(2)]
WHOLE = [reusable(prompt, PAGE_TOKENS) for prompt in PROMPTS]

Node = tuple[Daemon, SglangServer]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A kvd with the prompts' pages, and the worker that put them there."""
    with running("first", page_size=PAGE_TOKENS, max_total_tokens=4096) as (kvd, server):
        fill(server, PROMPTS)
        yield kvd, server


def another(name: str, kvd: Daemon, **options: Any) -> SglangServer:
    return worker(name, kvd.socket, page_size=PAGE_TOKENS, max_total_tokens=4096, **options)


def outputs(server: SglangServer, **fields: Any) -> list[list[int]]:
    return [ask(server, prompt, **fields).output_ids for prompt in PROMPTS]


def from_storage(server: SglangServer, **fields: Any) -> list[int]:
    """Tokens of each prompt that come from kvd to a worker that has nothing itself."""
    server.flush_cache()
    return [ask(server, prompt, **fields).cached.storage for prompt in PROMPTS]


def shares_nothing(stranger: SglangServer) -> None:
    """It finds no page of these prompts, answers as it would alone, and then has its own pages beside the others."""
    met = [ask(stranger, prompt) for prompt in PROMPTS]
    assert [answer.cached.total for answer in met] == [0] * len(PROMPTS)
    alone = outputs(stranger, cache_salt=salt())
    assert [answer.output_ids for answer in met] == alone
    # Not compared with those: in half precision a CPU's matrix units round otherwise where less is computed at once.
    cached = outputs(stranger)
    assert from_storage(stranger) == WHOLE
    assert outputs(stranger) == cached


# -- workers -----------------------------------------------------------------------------------------------------


def test_two_workers_of_one_model_share_every_page(node: Node) -> None:
    kvd, first = node
    held = pages_held(kvd)
    with another("second", kvd) as second:
        plugin_ready(kvd, 2)
        assert from_storage(second) == WHOLE
        assert outputs(second) == outputs(first)
        assert pages_held(kvd) == held, "nothing is stored twice"
        ask(second, PROMPTS[0], cache_salt="from the second")
        second.flush_cache()
        assert ask(first, PROMPTS[0], cache_salt="from the second").cached.storage == WHOLE[0]


def test_two_revisions_of_a_model_share_nothing_whatever_they_are_called(node: Node) -> None:
    kvd, first = node
    mine = outputs(first)
    with another("revision", kvd, model=other_revision()) as other:
        plugin_ready(kvd, 2)
        shares_nothing(other)
        assert outputs(other) != mine, "else this test shows nothing"
    assert from_storage(first) == WHOLE
    assert outputs(first) == mine


@pytest.mark.slow
def test_dtypes_share_nothing_even_when_their_pages_have_the_same_size(node: Node) -> None:
    kvd, first = node
    mine = outputs(first)
    for dtype in ("bfloat16", "float16"):
        with another(dtype, kvd, dtype=dtype) as other:
            plugin_ready(kvd, 2)
            shares_nothing(other)
    assert from_storage(first) == WHOLE
    assert outputs(first) == mine


# -- tenants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache_salt", "extra_key"])
def test_salts_share_nothing_with_each_other_or_with_plain_requests(node: Node, name: str) -> None:
    kvd, server = node
    plain = outputs(server)
    one, two = {name: f"one {salt()}"}, {name: f"two {salt()}"}
    fill(server, PROMPTS, **one)
    assert from_storage(server, **two) == [0] * len(PROMPTS)
    assert from_storage(server, **one) == WHOLE
    assert from_storage(server) == WHOLE
    assert outputs(server, **one) == outputs(server, **two) == plain
    assert kvd.faults() == []


# -- names -------------------------------------------------------------------------------------------------------


def test_kvd_files_pages_under_the_keys_that_we_compute(node: Node) -> None:
    kvd, server = node
    mine = salt()
    (_, salted), (_, plain) = fill(server, [PROMPTS[0]], cache_salt=mine) + fill(server, [PROMPTS[0]])
    link = kvd.tool()
    try:
        prefixes = link.ask(wire.GetPrefixes(1000), wire.Prefixes, 5.0).prefixes
    finally:
        link.close()
    keys = {prefix.key for prefix in prefixes}
    for answer, parent in ((plain, None), (salted, seed(cache_salt=mine))):
        tokens = [*PROMPTS[0], *answer.output_ids[:-1]]
        assert chain(tokens, PAGE_TOKENS, parent)[-1].hex() in keys


SGLANG_HASHES = """
import json, sys
from array import array
from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash
from sglang.srt.mem_cache.utils import get_hash_str, storage_namespace_seed

answers = []
for case in json.load(sys.stdin):
    tokens, page, seed = case["tokens"], case["page"], storage_namespace_seed(case["extra_key"], case["salt"])
    one_by_one, parent = [], seed
    for start in range(0, len(tokens) - page + 1, page):
        parent = get_hash_str(tokens[start : start + page], parent)
        one_by_one.append(parent)
    whole = len(tokens) // page * page
    digest = bytes.fromhex(seed) if seed else None
    at_once = get_native_hash(array("q", tokens[:whole]), digest, page)
    answers.append({"seed": seed, "one_by_one": one_by_one, "at_once": at_once})
print(json.dumps(answers))
"""


def _random_cases() -> list[dict[str, Any]]:
    draw = Random(11)
    names = (None, "", "a", "tenant-7", "naïve ☃", "x" * 300)
    return [
        {
            "tokens": [draw.randrange(1 << draw.choice((8, 17, 31))) for _ in range(draw.randint(page, 6 * page))],
            "page": page,
            "extra_key": draw.choice(names),
            "salt": draw.choice(names),
        }
        for page in (1, 16, 64)
        for _ in range(20)
    ]


def test_page_keys_are_those_of_the_installed_sglang() -> None:
    cases = _random_cases()
    answers = _ask_sglang(cases)
    for case, answer in zip(cases, answers, strict=True):
        start = seed(case["extra_key"], case["salt"])
        assert answer["seed"] == (start.hex() if start else None)
        keys = [key.hex() for key in chain(case["tokens"], case["page"], start)]
        assert answer["one_by_one"] == keys
        assert answer["at_once"] == keys


def _ask_sglang(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    asked = subprocess.run(
        [str(VENV / "bin/python"), "-W", "ignore", "-c", SGLANG_HASHES],
        input=json.dumps(cases),
        env=environment_of(VENV),
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
    answers: list[dict[str, Any]] = json.loads(asked.stdout.splitlines()[-1])
    return answers


@pytest.mark.slow
def test_weights_updated_online_are_another_model() -> None:
    """The page keys stay the same; the plugin must notice, and the new weights' pages must come back in their turn."""
    prompt, size = words(600, 300), {"page_size": PAGE_TOKENS, "max_total_tokens": 4096}
    with running("update", **size) as (kvd, server):
        before = ask(server, prompt)
        server.flush_cache()
        assert ask(server, prompt).cached.storage
        held = pages_held(kvd)
        server.request("POST", "/update_weights_from_disk", {"model_path": str(other_revision())}, 120)
        after = ask(server, prompt)
        assert after.cached.total == 0, "nothing of the old weights is given back"
        assert after.output_ids != before.output_ids
        eventually(lambda: ask(server, prompt, cache_salt=salt()) and pages_held(kvd) > held, 60)
        fill(server, [prompt], cache_salt=(mine := salt()))
        again = ask(server, prompt, cache_salt=mine)
        assert again.cached.storage
        assert again.output_ids == after.output_ids
        assert kvd.faults() == []
