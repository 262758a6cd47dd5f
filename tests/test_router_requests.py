"""Every request has tokens or a reason: what is refused, and why; whose blocks a prompt may use."""

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvd.errors import SettingsError
from kvd.router.tokens import responses
from kvd.router.tokens.blocks import Scheme, hashes
from kvd.router.tokens.outcome import Namespace, Why
from kvd.router.tokens.requests import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    GENERATE,
    MESSAGES,
    RESPONSES,
    Tokeniser,
)
from kvd.router.tokens.serving import Serving
from kvd.router.tokens.values import as_read
from tests import router_models

HELLO = [{"role": "user", "content": "hello"}]
IMAGE = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:,"}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return router_models.folder(
        tmp_path_factory.mktemp("m"), router_models.with_special(router_models.byte_level(), bos=True)
    )


@pytest.fixture(scope="module")
def tokeniser(model: Path) -> Iterator[Tokeniser]:
    opened = Tokeniser.open(model, Serving.of({"served_model_name": "m", "lora_paths": {"poet": "/adapters/poet"}}))
    yield opened
    opened.close()


def _calling(arguments: Any, **more: Any) -> dict[str, Any]:
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}, **more}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


REFUSED: list[tuple[str, Any, Why]] = [
    (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, Why.MULTIMODAL),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, Why.MULTIMODAL),
    (GENERATE, {"text": "x", "image_data": ["data:,"]}, Why.MULTIMODAL),
    (EMBEDDINGS, {"input": [{"text": "x", "image": "data:,"}]}, Why.MULTIMODAL),
    (GENERATE, {"input_embeds": [[0.1]]}, Why.EMBEDS),
    (GENERATE, {"text": "x", "session_params": {"id": "s"}}, Why.STATE),
    (RESPONSES, {"input": "x", "previous_response_id": "resp_1"}, Why.STATE),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, Why.UNSUPPORTED),
    (MESSAGES, {"messages": HELLO, "thinking": {"type": "adaptive"}}, Why.UNSUPPORTED),
    (CHAT, {"messages": HELLO, "reasoning_effort": 10**400}, Why.INVALID),
    (
        CHAT,
        {"messages": HELLO, "tools": [{"function": {"name": "f", "parameters": {"type": "varchar"}}}]},
        Why.UNSUPPORTED,
    ),
    # What the worker's models take for a truth or a number, by rules of their own
    (
        CHAT,
        {"messages": [*HELLO, {"role": "assistant", "content": "x"}], "continue_final_message": 1},
        Why.UNSUPPORTED,
    ),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "prefix": "true"}]}, Why.UNSUPPORTED),
    (CHAT, {"messages": HELLO, "tools": [{"function": {"name": "f", "strict": "yes"}}]}, Why.UNSUPPORTED),
    (CHAT, {"messages": HELLO, "tools": [{"function": {"name": "f"}, "defer_loading": 1}]}, Why.UNSUPPORTED),
    (RESPONSES, {"input": "x", "tools": [{"type": "function", "name": "f", "strict": "true"}]}, Why.UNSUPPORTED),
    (CHAT, {"messages": [_calling({}, index="3")]}, Why.UNSUPPORTED),
    (CHAT, {"messages": [_calling({"n": 10**309})]}, Why.INVALID),
    (CHAT, {"messages": []}, Why.INVALID),
    (CHAT, {"messages": [{"role": "function", "content": "the template refuses it"}]}, Why.INVALID),
    (CHAT, {"messages": [{"role": "User", "content": "x"}]}, Why.INVALID),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, Why.INVALID),
    (CHAT, ["no object"], Why.INVALID),
    (COMPLETIONS, {}, Why.INVALID),
    (COMPLETIONS, {"prompt": [-1]}, Why.INVALID),
    (COMPLETIONS, {"prompt": [1 << 32]}, Why.INVALID),
    (COMPLETIONS, {"prompt": ["a", "b"], "cache_salt": ["one"]}, Why.INVALID),
    ("/v1/audio/speech", {"input": "x"}, Why.ENDPOINT),
]


@pytest.mark.parametrize(("path", "body", "why"), REFUSED)
def test_no_tokens_has_a_reason_and_is_counted(tokeniser: Tokeniser, path: str, body: Any, why: Why) -> None:
    before = tokeniser.counts[why]
    (prompt,) = tokeniser.tokenise(path, body)
    assert (prompt.ids, prompt.reason) == (None, why), prompt
    assert prompt.detail
    assert tokeniser.counts[why] == before + 1
    assert tokeniser.hashes(prompt, Scheme(1)) == []


@pytest.mark.parametrize(
    "junk", [None, 1, "x", [], {}, [None], [[]], {"a": None}, [{"type": None}], [{"role": "user", "content": [3]}]]
)
def test_nothing_that_a_client_sends_raises(tokeniser: Tokeniser, junk: Any) -> None:
    names = (
        "messages",
        "tools",
        "prompt",
        "input",
        "text",
        "input_ids",
        "system",
        "tool_choice",
        "reasoning",
        "model",
    )
    paths = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS, GENERATE)
    asked = [(path, {"messages": HELLO, "input": "x", name: junk}) for path in paths for name in names]

    async def ask_all() -> None:
        for path, body in asked:
            assert [prompt.ids for prompt in await tokeniser.tokenise_soon(path, body)] == [
                prompt.ids for prompt in tokeniser.tokenise(path, body)
            ]

    asyncio.run(ask_all())


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_turn_of_very_many_messages_is_joined_without_copying_it_for_each() -> None:
    many = 150_000  # one after the other that was minutes, in one of the two threads that all long prompts share
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    said = [{"role": "assistant", "content": "a"}, call, {"type": "reasoning", "summary": [{"text": "t"}]}] * many
    (turn,) = responses.as_chat({"input": said}, True)["messages"]
    assert turn["content"] == "\n\n".join("a" * many)
    assert turn["reasoning_content"] == "\n".join("t" * many)
    assert len(turn["tool_calls"]) == many


def test_ids_are_taken_as_they_are(tokeniser: Tokeniser) -> None:
    for path, body in [
        (GENERATE, {"input_ids": [3, 1, 2]}),
        (COMPLETIONS, {"prompt": [3, 1, 2]}),
        (CHAT, {"messages": HELLO, "input_ids": [3, 1, 2]}),
        (EMBEDDINGS, {"input": [3, 1, 2]}),
    ]:
        (prompt,) = tokeniser.tokenise(path, body)
        assert list(prompt.ids or []) == [3, 1, 2]
        assert tokeniser.hashes(prompt, Scheme(2)) == hashes([3, 1], Scheme(2).names(Namespace()))


def test_a_batch_has_a_prompt_each_with_its_own_salt(tokeniser: Tokeniser) -> None:
    body = {"text": ["a", "b"], "cache_salt": ["one", ""], "extra_key": "all"}
    one, two = tokeniser.tokenise(GENERATE, body)
    assert (one.namespace, two.namespace) == (Namespace("one", "all"), Namespace(None, "all"))
    assert tokeniser.hashes(one, Scheme(1)) != tokeniser.hashes(two, Scheme(1))


def test_salts_that_the_worker_does_not_read_name_nothing(tokeniser: Tokeniser) -> None:
    salts = {"cache_salt": "s", "extra_key": "k"}
    for path, body in [(MESSAGES, {"messages": HELLO, "max_tokens": 1}), (EMBEDDINGS, {"input": "a"})]:
        (prompt,) = tokeniser.tokenise(path, {**body, **salts})
        assert prompt.ids is not None
        assert prompt.namespace == Namespace()
    assert tokeniser.tokenise(CHAT, {"messages": HELLO, **salts})[0].namespace == Namespace("s", "k")


def test_a_texts_surroundings_are_the_tokenizers_and_a_chats_are_its_templates(tokeniser: Tokeniser) -> None:
    bos = tokeniser.encoder.reference.bos_id
    text, chat = tokeniser.tokenise(GENERATE, {"text": "hello"})[0], tokeniser.tokenise(CHAT, {"messages": HELLO})[0]
    assert text.ids is not None
    assert chat.ids is not None
    assert list(text.ids).count(bos) == 1
    assert list(chat.ids).count(bos) == 1, "the template writes it; the tokenizer does not add another"


@pytest.mark.parametrize("body", [{"model": "m:poet"}, {"model": "m", "lora_path": "poet"}])
def test_an_adapter_is_named_by_model_or_by_path(tokeniser: Tokeniser, body: dict[str, Any]) -> None:
    (prompt,) = tokeniser.tokenise(COMPLETIONS, {"prompt": "x", **body})
    assert prompt.namespace == Namespace(adapter="poet")
    assert tokeniser.serving.adapters == {"poet": uuid.uuid5(uuid.NAMESPACE_URL, "poet\0/adapters/poet").hex}
    assert tokeniser.hashes(prompt, Scheme(1, adapters=tokeniser.serving.adapters))
    assert tokeniser.hashes(prompt, Scheme(1)) == [], "its id is not known: no credit"


@pytest.mark.parametrize(
    ("path", "by_model", "by_path"),
    [
        (CHAT, True, True),
        (COMPLETIONS, True, True),
        (EMBEDDINGS, True, True),
        (MESSAGES, True, False),
        (GENERATE, False, True),
        (RESPONSES, False, False),
    ],
)
def test_an_adapter_counts_where_the_worker_takes_one(
    tokeniser: Tokeniser, path: str, by_model: bool, by_path: bool
) -> None:
    asked = {"messages": HELLO, "prompt": "x", "input": "x", "text": "x"}
    for told, counts in (({"model": "m:poet"}, by_model), ({"model": "m", "lora_path": "poet"}, by_path)):
        (prompt,) = tokeniser.tokenise(path, {**asked, **told})
        assert prompt.ids is not None
        assert prompt.namespace == Namespace(adapter="poet" if counts else None), told


def test_integers_beyond_64_bits_are_floats_as_the_worker_reads_them() -> None:
    kept = [1 << 64, (1 << 64) - 1, -(1 << 63), -(1 << 63) - 1, 1.5, True, None, "1"]
    read = as_read({"deep": [kept]})
    assert repr(read) == repr({"deep": [[float(1 << 64), *kept[1:3], -float(1 << 63), *kept[4:]]]})
    assert kept[0] == 1 << 64
    assert type(kept[0]) is int, "what was given is as it was"


@pytest.mark.parametrize(
    ("mark", "switched"),
    [
        ("", True),
        ("{% set enable_thinking = enable_thinking | default(true) %}", True),
        ("{% set enable_thinking = enable_thinking | default(false) %}", None),
        ("{% if not enable_thinking is defined %}{% set enable_thinking = false %}{% endif %}", None),
        ("<|channel|>", None),
        ("{{ reasoning_effort }}[THINK]", None),
    ],
)
def test_low_effort_is_a_switch_unless_another_family_may_be_meant(
    tmp_path: Path, mark: str, switched: bool | None
) -> None:
    template = f"{mark}{{{{ messages[0].content }}}}{{{{ 'LOW' if low_effort }}}}{{# truncate_history_thinking #}}"
    folder = router_models.folder(tmp_path, router_models.with_special(router_models.byte_level()), template)
    opened = Tokeniser.open(folder, Serving())
    (low,) = opened.tokenise(CHAT, {"messages": HELLO, "reasoning_effort": "low"})
    (high,) = opened.tokenise(CHAT, {"messages": HELLO, "reasoning_effort": "high"})
    assert high.ids
    if switched:
        assert low.ids == high.ids + opened.encoder.encode("LOW").ids
    else:
        assert low.reason is Why.UNSUPPORTED
    opened.close()


@pytest.mark.parametrize(
    "serving",
    [
        Serving(chat_template="vicuna_v1.1"),
        Serving(model_path="/m/llava-v1.5-7b"),
        Serving(tool_call_parser="kimi_k3"),
    ],
)
def test_prompts_made_by_sglangs_own_code_are_refused_and_texts_are_not(model: Path, serving: Serving) -> None:
    opened = Tokeniser.open(model, serving)
    assert opened.tokenise(CHAT, {"messages": HELLO})[0].reason is Why.TEMPLATE
    assert opened.tokenise(COMPLETIONS, {"prompt": "x"})[0].ids
    opened.close()


def test_the_workers_own_template_goes_before_the_folders(model: Path, tmp_path: Path) -> None:
    named = tmp_path / "own.jinja"
    named.write_text("\n{{ messages[0].content }}\\n!\n")
    opened = Tokeniser.open(model, Serving(chat_template=str(named)))
    assert opened.tokenise(CHAT, {"messages": HELLO})[0].ids == opened.encoder.encode("hello\n!").ids
    opened.close()


def test_a_folder_that_cannot_be_used_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        Tokeniser.open(tmp_path, Serving())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingsError, match="cannot be read"):
        Tokeniser.open(tmp_path, Serving())
    made = router_models.with_special(router_models.byte_level())
    with pytest.raises(SettingsError, match="does not compile"):
        Tokeniser.open(router_models.folder(tmp_path, made, "{% if %}"), Serving())
    with pytest.raises(SettingsError, match="splits special tokens"):
        Tokeniser.open(router_models.folder(tmp_path, made, split_special_tokens=True), Serving())
