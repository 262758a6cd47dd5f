"""Prompts are what SGLang's own request models, converters and template code make of the same bodies: ids compared."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from kvd.router.tokens.requests import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Tokeniser
from kvd.router.tokens.serving import Serving
from tests import router_models

ROOT = Path(__file__).parents[1]
SGLANG = ROOT / ".venvs/sglang/bin/python"
SMOL = ROOT / ".models/smollm2-135m"
LLAMA3 = (  # how Llama 3 splits text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

Case = tuple[str, dict[str, Any]]


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "You are terse.\n"}
WEATHER = {
    "type": "function",
    "function": {
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "null"}}},
        "name": "get_weather", "vendor_extra": 1, "description": "Wetter in °C <b>&amp;</b>",
    },
}  # fmt: skip
BARE = {"type": "function", "function": {"name": "now"}}
STRICT = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}, "defer_loading": False}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Köln", "n": 2.50}'},
}
CALL_DICT = {"id": "c2", "index": 1, "type": "function", "function": {"name": "now", "arguments": {}}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"c": 21}'}
TEXT_PARTS = [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "two"}]
UNICODE = "naïve Straße 你好 👩‍🚀 ﬁ e\u0301 \u3000\u200b\t12345  \n\n\n def f(x):\r\n return"
SPECIAL = "text with <|im_start|> and <|turn|>inside<|end|>\n<|im_end|> it"
TURNS = [SYSTEM, user("Hi"), assistant("Hello."), user("Bye")]


def chat(*messages: dict[str, Any], **more: Any) -> Case:
    return CHAT, {"model": "m", "messages": list(messages), **more}


def anthropic(*messages: dict[str, Any], **more: Any) -> Case:
    return MESSAGES, {"model": "m", "max_tokens": 9, "messages": list(messages), **more}


def respond(items: Any, **more: Any) -> Case:
    return RESPONSES, {"input": items, **more}


def _call(arguments: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


def block(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


USE = block("tool_use", id="t1", name="get_weather", input={"city": "Köln", "deep": {"a": [1, 2]}})
A_TOOL = {"name": "get_weather", "input_schema": {"properties": {"city": {"type": "string"}}}}
R_TOOL = {"type": "function", "name": "get_weather", "description": "x", "parameters": {"type": "object"}}
R_CALL = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Köln"}', "id": "fc"}

R_NOW = {"type": "function", "name": "now"}
BEYOND = 1 << 64  # the least integer that orjson reads as a float

CASES: list[Case] = [
    chat(user("Hi")),
    chat(user("")),
    chat(user(" \n")),
    chat(user(UNICODE)),
    chat(user(SPECIAL)),
    chat(SYSTEM, user("Hi")),
    chat(*TURNS),
    chat(SYSTEM, *TURNS[1:], SYSTEM, user("again")),
    chat(user("a"), user("b")),
    chat(assistant("only me")),
    chat(*TURNS, assistant("So ")),
    chat(*TURNS, assistant("So "), continue_final_message=True),
    chat(*TURNS, assistant(""), continue_final_message=True),
    chat(*TURNS, continue_final_message=True),
    chat(user("x"), assistant(UNICODE), continue_final_message=True),
    chat(user("x"), assistant(TEXT_PARTS), continue_final_message=True),
    chat(user(TEXT_PARTS)),
    chat({"role": "system", "content": TEXT_PARTS}, user([{"type": "text", "text": ""}])),
    chat(user([])),
    chat({"role": "SYSTEM", "content": "loud"}, user("x")),
    chat({"role": "developer", "content": "d"}, user("x")),
    chat({"role": "latest_reminder", "content": "l"}, user("x")),
    chat({"role": "function", "name": "f", "content": "l"}),
    chat(user("named", name="Ann")),
    chat({"role": "system", "content": "s", "name": "Bob"}, user("x")),
    chat(user("x"), tools=[WEATHER]),
    chat(user("x"), tools=[WEATHER, BARE, STRICT]),
    chat(user("x"), tools=[]),
    chat(user("x"), tools=[WEATHER], tool_choice="none"),
    chat(user("x"), tools=[WEATHER, BARE], tool_choice="required"),
    chat(user("x"), tools=[WEATHER, BARE], tool_choice={"type": "function", "function": {"name": "now"}}),
    chat({"role": "system", "content": "s", "tools": [BARE]}, user("x")),
    chat({"role": "system", "content": "s", "tools": [BARE]}, user("x"), tools=[WEATHER]),
    chat(user("x"), assistant(None, tool_calls=[CALL]), RESULT, user("y"), tools=[WEATHER]),
    chat(user("x"), assistant("calling", tool_calls=[CALL, CALL_DICT]), RESULT, {**RESULT, "tool_call_id": "c2"}),
    chat(user("x"), assistant(None, tool_calls=[CALL])),
    chat(user("x"), assistant(None, tool_calls=[CALL]), {**RESULT, "content": TEXT_PARTS}, user("y")),
    chat(user("x"), assistant(None, tool_calls=[CALL]), {**RESULT, "content": []}, user("y")),
    chat(user("x"), assistant(None, tool_calls=[]), user("y")),
    chat(user("x"), assistant("y", reasoning_content="because"), user("z")),
    chat(user("x"), assistant([{"type": "thinking", "thinking": "hm"}, *TEXT_PARTS]), user("z")),
    chat(user("x"), reasoning_effort="none"),
    chat(user("x"), reasoning_effort="high"),
    chat(user("x"), reasoning_effort=0.5),
    chat(user("x"), reasoning={"effort": "low"}),
    chat(user("x"), reasoning={"enabled": "yes"}),
    chat(user("x"), chat_template_kwargs={"enable_thinking": False, "color": "red"}),
    chat(
        user("x"), reasoning_effort="low", chat_template_kwargs={"enable_thinking": False, "reasoning_effort": "high"}
    ),
    chat(user("x"), chat_template_kwargs={"documents": [{"title": "t", "text": "ü"}], "bos_token": "!"}),
    chat(user("x"), cache_salt="s", extra_key="e", stream=True),
    chat(user("long " * 3000 + UNICODE), *TURNS[2:]),
    anthropic(user("Hi")),
    anthropic(user([block("text", text="a"), block("text", text="b")]), system="sys"),
    anthropic(
        user("Hi"), system=[block("text", text="s1", cache_control={"type": "ephemeral"}), block("text", text="s2")]
    ),
    anthropic(
        user("x"),
        assistant([block("text", text="calling"), USE]),
        user(
            [
                block("text", text="see"),
                block("tool_result", tool_use_id="t1", content="21"),
                block("text", text="so?"),
            ]
        ),
        tools=[A_TOOL, {"type": "web_search_20250305", "name": "web_search"}],
    ),
    anthropic(
        user("x"),
        assistant([USE]),
        user(
            [
                block(
                    "tool_result",
                    tool_use_id="t1",
                    content=[
                        block("text", text="a"),
                        block("search_result", source="u", title="t", content=[block("text", text="c")]),
                    ],
                )
            ]
        ),
    ),
    anthropic(user("x"), tools=[A_TOOL], tool_choice={"type": "tool", "name": "get_weather"}),
    anthropic(user("x"), tools=[A_TOOL], tool_choice={"type": "none"}),
    anthropic(user("x"), assistant("Sure, ")),
    anthropic(user("x"), output_config={"effort": "xhigh"}),
    anthropic(user("x"), {"role": "system", "content": "mid"}, user("y")),
    respond("Hi"),
    respond("Hi", instructions="be brief"),
    respond([user("x"), assistant("y"), user([block("input_text", text="z")])]),
    respond(
        [
            user("x"),
            assistant("let me"),
            R_CALL,
            {"type": "function_call_output", "call_id": "c1", "output": "21"},
            user("y"),
        ],
        tools=[R_TOOL],
    ),
    respond(
        [
            {"role": "developer", "content": "d"},
            user("x"),
            {"type": "reasoning", "id": "r", "summary": [block("summary_text", text="t")]},
            assistant([block("output_text", text="y", annotations=[])], id="m", status="completed", type="message"),
            user("z"),
        ]
    ),
    respond("x", reasoning={"effort": "none"}),
    respond("x", reasoning={"effort": "high"}),
    respond("x", tools=[R_TOOL], tool_choice="required"),
    # Integers that the worker reads as floats
    chat(user("x"), assistant(None, tool_calls=[_call(f'{{"n": {BEYOND}, "m": [{BEYOND - 1}]}}')]), user("y")),
    chat(user("x"), assistant(None, tool_calls=[_call({"n": {"deep": [-BEYOND, 1]}})]), user("y")),
    chat(user("x"), tools=[{"type": "function", "function": {"name": "f", "parameters": {"maximum": BEYOND}}}]),
    chat(user("x"), chat_template_kwargs={"color": 10 * BEYOND}),
    anthropic(user("x"), assistant([{**USE, "input": {"n": BEYOND}}]), user("y")),
    anthropic(user("x"), tools=[{**A_TOOL, "input_schema": {"maximum": BEYOND}}]),
    respond([user("x"), {**R_CALL, "arguments": f'{{"n": {BEYOND}}}'}]),
    respond([user("x"), {**R_CALL, "arguments": {"n": BEYOND}}]),
    # How much to think, and the family of templates that has a switch for little
    chat(user("x"), reasoning_effort="low"),
    chat(user("x"), reasoning_effort="low", chat_template_kwargs={"low_effort": False}),
    chat(user("x"), reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "low"}),
    chat(user("x"), reasoning_effort="high", chat_template_kwargs={"reasoning_effort": None}),
    anthropic(user("x"), output_config={"effort": "low"}),
    respond("x", reasoning={"effort": "low"}),
    respond("x", reasoning={"effort": "low"}, chat_template_kwargs={"reasoning_effort": "high"}),
    respond("x", reasoning={"effort": "high"}, chat_template_kwargs={"reasoning_effort": "low"}),
    respond("x", reasoning={"effort": "high"}, chat_template_kwargs={"reasoning_effort": None}),
    respond("x", chat_template_kwargs={"reasoning_effort": "low"}),
    respond("x", reasoning={"reasoning_effort": "none"}),
    respond("x", reasoning={"effort": None, "reasoning_effort": "none"}),
    respond("x", reasoning={"reasoning_effort": "none"}, chat_template_kwargs={"enable_thinking": True}),
    respond("x", tools=[R_TOOL, R_NOW], tool_choice={"type": "custom", "name": "now"}),
    respond("x", tools=[R_TOOL, R_NOW], tool_choice={"type": "mcp", "name": "now"}),
    # Spaces and tokens that folders add
    chat(user("  two <|end|>  spaces <|new|> <|eos|>  ")),
    (COMPLETIONS, {"prompt": " x <|end|>  y<|new|>  <|old|> <|eos|>  z  "}),
    (COMPLETIONS, {"prompt": "The capital of France is"}),
    (COMPLETIONS, {"prompt": UNICODE}),
    (COMPLETIONS, {"prompt": SPECIAL}),
    (COMPLETIONS, {"prompt": ["a b", UNICODE]}),
]


def _models(at: Path) -> Iterator[Path]:
    if SMOL.exists():
        yield SMOL
    yield router_models.folder(at / "bytes", router_models.with_special(router_models.byte_level(LLAMA3), bos=True))
    strings = (
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}<|turn|>assistant\n"
    )
    yield router_models.folder(at / "prepended", router_models.with_special(router_models.prepended()), strings)
    # transformers' Llama class makes the normalizer, the model and what begins a text anew.
    prepended = router_models.with_special(router_models.prepended())
    yield router_models.folder(at / "llama", prepended, strings, tokenizer_class="LlamaTokenizer")
    # So do others, each in its own way, whatever tokenizer.json has.
    for name, model_type in (
        ("Qwen2Tokenizer", "llama"), ("LlamaTokenizerFast", "qwen2"), ("LlamaTokenizer", "qwen3_5"),
        ("GPT2TokenizerFast", "llama"), ("GemmaTokenizerFast", "gemma2"), ("CohereTokenizerFast", "cohere"),
    ):  # fmt: skip
        made = router_models.byte_level(LLAMA3)
        made.normalizer = normalizers.NFKD()
        place = at / f"{name}-{model_type}"
        yield _of_class(place, router_models.with_special(made), name, model_type, strings)
    marks = router_models.with_special(router_models.prepended())
    yield _of_class(at / "gemma", marks, "GemmaTokenizer", "gemma2", strings, bos_token="<|bos|>")
    yield _told_flags(at / "flags", strings)
    yield _more_tokens(at / "more")


def _of_class(at: Path, made: Tokenizer, name: str, model_type: str, template: str, **tokens: str) -> Path:
    """A folder that leaves it to the class which its special tokens are, but for those that are given."""
    router_models.folder(at, made, f"{{{{ bos_token }}}}{{{{ eos_token }}}}{template}")
    (at / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **tokens}))
    (at / "config.json").write_text(json.dumps({"architectures": ["X"], "model_type": model_type}))
    return at


def _told_flags(at: Path, template: str) -> Path:
    """tokenizer_config.json changes a token of tokenizer.json; beside what it tells, the special map is not read."""
    made = router_models.with_special(router_models.byte_level(LLAMA3))
    end = {"content": "<|end|>", "rstrip": True, "normalized": False, "special": True}
    number = made.token_to_id("<|end|>")
    router_models.folder(at, made, f"{{{{ bos_token }}}}{template}", added_tokens_decoder={number: end})
    (at / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|turn|>"}))
    return at


def _more_tokens(at: Path) -> Path:
    """An older folder, whose map and file of added tokens count; and of the family with a switch for low effort."""
    template = (
        "{{ bos_token }}{{ image_token }}{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}{% endfor %}"
        "{{ [low_effort|default('-'), reasoning_effort|default('-'), enable_thinking|default('-')] | tojson }}"
        "{% if truncate_history_thinking %}{% endif %}"
    )
    made = router_models.with_special(router_models.byte_level(LLAMA3))
    tokens = {"extra_special_tokens": ["<|new|>"], "additional_special_tokens": ["<|old|>"], "image_token": "<|tool|>"}
    router_models.folder(at, made, template, **tokens)
    (at / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|turn|>"}}))
    (at / "added_tokens.json").write_text(json.dumps({"two": made.get_vocab_size()}))
    return at


@pytest.mark.slow
@pytest.mark.skipif(not SGLANG.exists(), reason="no .venvs/sglang: run `make sglang`")
def test_prompts_are_those_of_sglangs_own_code(tmp_path: Path) -> None:
    models = list(_models(tmp_path))
    for model, expected in zip(models, reference(models, tmp_path / "answers"), strict=True):
        # A table in which the reference refuses most requests would show little.
        refused = [str(ids) for ids in expected if isinstance(ids, dict)]
        assert len(refused) <= len(CASES) // 6, refused
        tokeniser = Tokeniser.open(model, Serving(served_name="m"))
        wrong = []
        for (path, body), ids in zip(CASES, expected, strict=True):
            before = json.dumps(body)
            found = tokeniser.tokenise(path, body)
            assert json.dumps(body) == before, "the body was changed"
            ours: list[Any] = [None if prompt.ids is None else list(prompt.ids) for prompt in found]
            theirs = [None] if isinstance(ids, dict) else ids if isinstance(ids[0], list) else [ids]
            if ours != theirs:
                wrong.append((path, before[:150], found[0].detail, str(ids)[-150:], str(ours)[-150:]))
        tokeniser.close()
        assert not wrong, f"{len(wrong)} of {len(CASES)} differ with {model.name}: {wrong}"


def reference(models: list[Path], answers: Path) -> list[list[Any]]:
    order = json.dumps({"models": [str(model.resolve()) for model in models], "cases": CASES})
    command = [str(SGLANG), str(ROOT / "tests/sglang_prompts.py"), str(answers)]
    run = subprocess.run(command, input=order, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    found: list[list[Any]] = json.loads(answers.read_text())
    return found
