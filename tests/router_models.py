"""Models as folders, made on the spot: small tokenizers of several kinds, and a template that asks for everything."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The capital of France is Paris. What is the capital of Spain?",
    "def main():\n    print('hello world')\n\n\nimport json",
    "naïve café Straße 12345 你好 世界 Привет, мир! 👩‍🚀 \t\t end",
    '{"name": "get_weather", "arguments": {"city": "Berlin", "days": 3}}',
] * 8

SPECIAL = ["<|bos|>", "<|turn|>", "<|end|>", "<|tool|>", "<|eos|>"]

# A template with what the common ones have: tools and tool calls as JSON, reasoning switches, macros, special tokens,
# control of loops, a generation block, trimmed content, and parts where content is a list.
TEMPLATE = """\
{%- macro shown(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}{%- for part in content -%}{{ part.text if part.type == 'text' else '' }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- if tools %}<|turn|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ tools | tojson(indent=2) }}<|end|>
{% endif %}
{%- set ns = namespace(n=0) %}
{%- for message in messages %}
    {%- if message.role == 'latest_reminder' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {%- if message.role == 'function' %}{{ raise_exception('no functions here') }}{% endif %}
    {%- if message.role == 'assistant' %}<|turn|>assistant
{% generation %}
        {%- if message.reasoning_content is defined and message.reasoning_content %}
<think>{{ message.reasoning_content }}</think>
        {% endif %}
        {{- shown(message.content) | trim }}
        {%- for call in message.tool_calls or [] %}
<|tool|>{{ call | tojson }}
{{ call.function.name }}(
            {%- for key, value in call.function.arguments.items() %}{{ key }}={{ value | tojson }}, {% endfor %})
        {%- endfor %}
    {%- endgeneration %}<|end|>
    {%- else %}<|turn|>{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}
    {%- if message.tool_call_id %} #{{ message.tool_call_id }}{% endif %}

{{ message['content'] if message['content'] is string else '' }}
        {%- for content in message['content'] if message['content'] is not string %}{{ content | tojson }}{% endfor -%}
<|end|>
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}<|turn|>assistant
    {% if enable_thinking is defined and not enable_thinking %}<think></think>
    {%- elif reasoning_effort %}<effort {{ reasoning_effort }}>{% endif %}
{% endif %}
{%- if documents %}{{ documents | tojson }}{% endif %}{{- color | default('') }}"""


def byte_level(regex: str | None = None) -> tokenizers.Tokenizer:
    """As Qwen, Llama 3 and GPT-2: bytes, a splitting rule, merges."""
    made = tokenizers.Tokenizer(models.BPE())
    steps = [] if regex is None else [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def digits_alone() -> tokenizers.Tokenizer:
    """As SmolLM and StarCoder 2: each digit by itself, then as GPT-2."""
    made = byte_level()
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return made


def prepended() -> tokenizers.Tokenizer:
    """As Llama 2: a mark before every text, spaces as marks, no splitting."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False))
    return made


def metaspace(scheme: str = "first") -> tokenizers.Tokenizer:
    """As T5 and newer Llama 2 folders: only the first piece of a text gets a mark."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


def with_special(made: tokenizers.Tokenizer, bos: bool = False, **flags: Any) -> tokenizers.Tokenizer:
    made.add_special_tokens([tokenizers.AddedToken(token, normalized=False, **flags) for token in SPECIAL])
    if bos:
        special = [(token, made.token_to_id(token)) for token in ("<|bos|>", "<|eos|>")]
        made.post_processor = processors.TemplateProcessing("<|bos|> $A", "<|bos|> $A $B", special)
    return made


def folder(at: Path, made: tokenizers.Tokenizer, template: str | None = TEMPLATE, **config: Any) -> Path:
    """A model's folder around a tokenizer; as much of a configuration as SGLang's loader wants."""
    at.mkdir(parents=True, exist_ok=True)
    made.save(str(at / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>", **config}
    (at / "tokenizer_config.json").write_text(json.dumps(told))
    (at / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    if template is not None:
        (at / "chat_template.jinja").write_text(template)
    return at
