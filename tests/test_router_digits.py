"""Digits as added tokens give the ids of the step that isolates them, and only where they are sure to."""

import json
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.router.tokens.digits import by_added_tokens
from kvd.router.tokens.folder import ModelFolder
from kvd.router.tokens.tokenizer import Fast, Reference
from tests import router_models

PIECES = st.sampled_from(
    ["0", "7", "42", " 1", "  2", " ", "  ", "\n", "\t", "\n\n3", "a", " b", "'s", "'", "ll", "<|turn|>", "<|tu", "|>"]
)
ASCII = st.lists(PIECES | st.text(st.characters(max_codepoint=127), max_size=5), max_size=30).map("".join)
OTHERS = st.lists(PIECES | st.sampled_from(["½", "٣", "Ⅻ", "é", "你", "\u180e", "\u3000"]), max_size=30).map("".join)


REFERENCE = Reference(ModelFolder(router_models.with_special(router_models.digits_alone()).to_str(), {}))
TOLD = by_added_tokens(REFERENCE.tokenizer.to_str())


@cache
def fast() -> Fast:
    pytest.importorskip("fastokens")
    return Fast(REFERENCE)


@given(ASCII)
@settings(deadline=None)
def test_digits_as_added_tokens_give_the_same_ids_of_ascii(text: str) -> None:
    assert TOLD is not None
    other = tokenizers.Tokenizer.from_str(TOLD)
    assert other.encode(text, add_special_tokens=False).ids == list(REFERENCE.encode([text])[0])


@given(st.lists(ASCII | OTHERS, max_size=3))
@settings(deadline=None)
def test_the_fast_backend_has_the_references_ids_of_ascii_and_of_any_other_numerals(texts: list[str]) -> None:
    assert fast().encode(texts) == REFERENCE.encode(texts)


def test_half_is_a_numeral_and_so_such_texts_go_another_way() -> None:
    assert TOLD is not None
    other = tokenizers.Tokenizer.from_str(TOLD)
    assert other.pre_tokenizer.pre_tokenize_str("x ½") != REFERENCE.tokenizer.pre_tokenizer.pre_tokenize_str("x ½")


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(REFERENCE.tokenizer.to_str()), **fields})


def with_token(content: str, **flags: Any) -> str:
    told = json.loads(REFERENCE.tokenizer.to_str())
    told["added_tokens"].append({**told["added_tokens"][0], "content": content, "id": 5000, **flags})
    return json.dumps(told)


@pytest.mark.parametrize(
    "told",
    [
        with_token("<|1|>"),
        with_token("<|x|>", single_word=True),
        changed(normalizer={"type": "NFKC"}),
        changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}),
        changed(pre_tokenizer=None),
        REFERENCE.tokenizer.to_str().replace('"individual_digits":true', '"individual_digits":false'),
        REFERENCE.tokenizer.to_str().replace('"add_prefix_space":false', '"add_prefix_space":true'),
        REFERENCE.tokenizer.to_str().replace('"7":', '"<7>":'),
    ],
)
def test_a_tokenizer_of_another_kind_is_left_alone(told: str) -> None:
    assert json.loads(told) != json.loads(REFERENCE.tokenizer.to_str())
    assert by_added_tokens(told) is None
