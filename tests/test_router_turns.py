"""Templates that write every message by itself give the same texts without being run; others are run."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.router.tokens.template import ChatTemplate
from tests import router_models

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAKEN = {
    "chatml": CHATML,
    "lines": "{{ bos_token }}\n{% for m in messages %}\n  {{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}\n",
    "branches": (
        "{% for m in messages -%} {% if m.role == 'user' %}U {{ m.content ~ '|' ~ m['content'] }}"
        "{% elif m.role in ['system', 'tool'] and not loop.first %}S {{ 'kept' if unknown is defined else m.role }}"
        "{% else %}{{ bos_token if messages.0.role is defined else '' }}{% endif %} {%- endfor %}{{ tools is none }}"
    ),
    "contents only": "{% for message in messages %}{{ message.content }}{% endfor %}",
}
BODIES = {
    "a filter": "{{ m.content | trim }}",
    "a filter on the role": "{{ m.role | upper }}",
    "a call": "{{ m.content.strip() }}",
    "a clock": "{{ strftime_now('%H') }}",
    "a refusal": "{% if m.role == 'user' %}{{ raise_exception('no') }}{% endif %}",
    "a condition on the content": "{% if m.content %}{{ m.content }}{% endif %}",
    "a choice by the content": "{{ m.content if m.content else 'x' }}",
    "a comparison": "{{ m.content == 'x' }}",
    "a part of the content": "{{ m.content[0] }}",
    "another field": "{{ m.name }}",
    "the message": "{{ m }}",
    "the index": "{{ loop.index }}{{ m.content }}",
    "the last": "{{ m.content }}{% if loop.last %}!{% endif %}",
    "the one before": "{{ messages[loop.index0 - 1].role }}",
    "the first one's content": "{{ messages[0].content }}",
    "the second one": "{{ messages[1].role }}",
    "all of them": "{{ messages }}",
    "a variable": "{% set x = m.role %}{{ x }}",
    "a loop": "{% for c in m.content %}{{ c }}{% endfor %}",
    "a block": "{% generation %}{{ m.content }}{% endgeneration %}",
}
WHOLE = {
    "a condition on the loop": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "a part of the messages": "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    "an else": "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}",
    "two loops": "{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}{{ m.role }}{% endfor %}",
    "a look at them before": "{{ messages[0].role }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "a look at them behind": "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}",
    "other messages": "{% set messages = [] %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "a count": "{% set n = namespace(n=0) %}{% for m in messages %}{% set n.n = n.n + 1 %}{{ n.n }}{% endfor %}",
    "a loop within": "{% if true %}{% for m in messages %}{{ m.content }}{% endfor %}{% endif %}",
    "a macro": "{% macro f(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "the tests' own": router_models.TEMPLATE,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MADE = {name: ChatTemplate(source, SPECIAL) for name, source in TAKEN.items()}
CONTENT = st.text(max_size=12) | st.sampled_from(["{{ x }}", "\0kvd: a content\0", "<|im_end|>", " \n"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT}),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", TAKEN)
@given(messages=MESSAGES)
@settings(deadline=None)
def test_the_text_is_the_templates_own(name: str, messages: list[dict[str, Any]]) -> None:
    made = MADE[name]
    assert made.turns is not None
    run = made.render(messages, variables={"not read": 1})  # with variables it is run
    assert made.turns.render(messages) == run
    assert made.render(messages) == run


@pytest.mark.parametrize("source", [*(f"{{% for m in messages %}}{body}{{% endfor %}}" for body in BODIES.values())])
def test_a_template_that_does_anything_else_with_a_message_is_run(source: str) -> None:
    assert ChatTemplate(source, SPECIAL).turns is None


@pytest.mark.parametrize("source", WHOLE.values())
def test_a_template_that_is_not_one_loop_over_the_messages_is_run(source: str) -> None:
    assert ChatTemplate(source, SPECIAL).turns is None


def test_what_is_no_text_goes_to_the_template_itself() -> None:
    made = MADE["contents only"]
    assert made.turns is not None
    assert made.render([{"role": "user", "content": [1]}, {"role": "user"}]) == "[1]"
    refusing = ChatTemplate("{% for m in messages %}{{ 'x' + m.content }}{% endfor %}")
    assert refusing.turns is not None
    with pytest.raises(TypeError):
        refusing.render([{"role": "user", "content": None}])


def test_what_only_the_variables_change_is_run_with_them() -> None:
    made = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}{{ color }}{{ tools }}")
    asked = [{"role": "user", "content": "x"}]
    assert made.render(asked) == "xNone"
    assert made.render(asked, variables={"color": "red"}) == "xredNone"
    assert made.render(asked, [{"type": "function"}]) == "x[{'type': 'function'}]"
    assert MADE["chatml"].render(asked, add_generation_prompt=False).endswith("x<|im_end|>\n")
