"""Event hashes as SGLang makes them: known answers, SGLang's own functions, and chains that grow."""

import json
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.router.tokens.blocks import Chain, Naming, Scheme, hashes
from kvd.router.tokens.outcome import PLAIN, Namespace, NoTokens, Why

ROOT = Path(__file__).parents[1]
SGLANG = ROOT / ".venvs/sglang/bin/python"
ADAPTERS = {"poet": "0123456789abcdef0123456789abcdef"}
ONE_TO_EIGHT = range(1, 9)


def named(namespace: Namespace, ids: Any = ONE_TO_EIGHT, page: int = 4, **options: Any) -> list[int]:
    return hashes(ids, Scheme(page, adapters=ADAPTERS, **options).names(namespace))


def test_known_answers_without_and_with_a_salt() -> None:
    assert named(PLAIN) == [-3488128144981237669, 5674439469042975057]
    assert named(Namespace(cache_salt="s1")) == [8751685944416650314, 5408712977347781210]


def test_pages_in_tiers_have_names_of_their_own_where_there_is_a_salt_or_a_key() -> None:
    def stored(namespace: Namespace) -> list[int]:
        return hashes(ONE_TO_EIGHT, Scheme(4, adapters=ADAPTERS).stores(namespace))

    assert stored(PLAIN) == named(PLAIN)
    assert stored(Namespace(cache_salt="s1")) == [7394837493541178788, 1592714952634860736]
    assert set(stored(Namespace(extra_key="class-a"))).isdisjoint(named(PLAIN))
    with pytest.raises(NoTokens):
        stored(Namespace(adapter="stranger"))


def test_a_tail_shorter_than_a_page_has_no_hash() -> None:
    assert named(PLAIN, range(1, 8)) == named(PLAIN)[:1]
    assert named(PLAIN, range(1, 4)) == []


def test_the_default_format_ignores_the_callers_extra_key_and_the_dynamo_format_does_not() -> None:
    ours = Namespace(extra_key="class-a")
    assert named(ours) == named(PLAIN)
    assert named(ours, format="dynamo") != named(PLAIN)
    assert named(PLAIN, format="dynamo") == named(PLAIN)


def test_an_adapter_has_hashes_of_its_own_and_one_whose_id_is_not_known_has_none() -> None:
    assert set(named(Namespace(adapter="poet"))).isdisjoint(named(PLAIN))
    with pytest.raises(NoTokens) as refused:
        named(Namespace(adapter="stranger"))
    assert refused.value.why is Why.ADAPTER


# Runs inside SGLang's environment: its own key chain, event hash and namespace functions.
_REFERENCE = """
import hashlib, json, sys
from types import SimpleNamespace
from sglang.srt.disaggregation.kv_events import kv_event_namespace_seed, namespaced_block_hash
from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.events import KVCacheEventRecorder, KvEventLoraNames

def python_hash(tokens, prior, page):  # instead of the compiled one, which takes half a minute to build
    out = []
    for at in range(0, len(tokens) - page + 1, page):
        body = b"".join(token.to_bytes(4, "little") for token in tokens[at : at + page])
        prior = hashlib.sha256((prior or b"") + body).digest()
        out.append(prior.hex())
    return out

utils.get_native_hash = python_hash
answers = []
for case in json.load(sys.stdin):
    page, salt, extra, ids = case["page"], case["salt"], case["extra"], case["ids"]
    names = KvEventLoraNames()
    if case["lora"]:
        extra = (extra or "") + case["lora"]
        names.register(SimpleNamespace(lora_id=case["lora"], extra_key=extra), "poet")
    class Key(list):
        extra_key, cache_salt, is_bigram = extra, salt, False
        token_ids = property(lambda self: list(self))
    root = SimpleNamespace(key=Key(), parent=None, hash_value=[], event_hash_value=None)
    whole = Key(ids[: len(ids) // page * page])
    node = SimpleNamespace(key=whole, parent=root, hash_value=None, event_hash_value=None)
    recorder = KVCacheEventRecorder(
        enabled=True, page_size=page, dynamo_format=case["format"] == "dynamo", lora_names=names
    )
    recorder.record_store(node)
    events = [hash for event in recorder.take() for hash in event.block_hashes]
    seed = utils.storage_namespace_seed(extra, salt)
    keys = python_hash(whole, bytes.fromhex(seed) if seed else None, page)
    answers.append([events, [int.from_bytes(bytes.fromhex(key)[:8], "big", signed=True) for key in keys]])
print(json.dumps(answers))
"""


@pytest.mark.skipif(not SGLANG.exists(), reason="no .venvs/sglang: run `make sglang`")
def test_hashes_are_those_of_sglangs_own_recorder_and_storage() -> None:
    draw = Random(4)
    cases = [
        {
            "page": page, "salt": salt, "extra": extra, "lora": lora, "format": form,
            "ids": draw.choices(range(1 << 17), k=draw.randint(page, 6 * page)),
        }
        for page in (1, 4, 64) for salt in (None, "s1", "ünï") for extra in (None, "x")
        for lora in (None, ADAPTERS["poet"]) for form in ("default", "dynamo")
    ]  # fmt: skip
    run = subprocess.run(
        [str(SGLANG), "-c", _REFERENCE], input=json.dumps(cases), capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for case, expected in zip(cases, json.loads(run.stdout.splitlines()[-1]), strict=True):
        namespace = Namespace(case["salt"], case["extra"], "poet" if case["lora"] else None)
        scheme = Scheme(case["page"], case["format"], ADAPTERS)
        assert [
            hashes(case["ids"], scheme.names(namespace)),
            hashes(case["ids"], scheme.stores(namespace)),
        ] == expected


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=40), st.lists(st.integers(0, 40), max_size=6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_chain_that_grew_is_the_chain_of_the_whole(ids: list[int], steps: list[int], salted: bool) -> None:
    naming = Naming(4, b"s" * 32 if salted else None, b"n" * 32 if salted else None)
    grown = Chain(naming)
    for end in sorted(min(step, len(ids)) for step in steps):
        grown.extend(ids[:end])
    grown.extend(ids)
    assert grown.hashes == hashes(ids, naming)
    fork = grown.fork(len(grown.hashes) // 2)
    fork.extend(ids)
    assert fork.hashes == grown.hashes
