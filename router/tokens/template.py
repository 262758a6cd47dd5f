"""Chat templates, rendered as transformers' apply_chat_template renders them. Pure, but for a template's own clock.

The environment is jinja2's immutable sandbox with the extensions and functions that templates expect. What SGLang
reads from a template's source before it uses it (what content looks like to it, whether it takes system messages in
the middle) is found here too. A template comes from the model's folder, never from a request.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from kvd.errors import SettingsError
from kvd.router.tokens.turns import Turns

Message = dict[str, Any]
_MEDIA_WORDS: Final = ("image", "audio", "video", "vision")
_SENTINEL: Final = "kvd-inline-system-sentinel"
_SWITCH: Final = ("low_effort", "truncate_history_thinking")
# Marks of families that SGLang looks for first (REASONING_MODE_RULES in its srt/parser/template_detection.py), told
# more widely than there.
_EARLIER_FAMILIES: Final = re.compile(
    r"<ifm\|think>|<\|channel\|>|\[gMASK\]<sop>|\[THINK\]|reasoning_mode_token"
    r"|set\s+enable_thinking\s*=\s*[fF]alse|enable_thinking[\s)]*\|\s*d(?:efault)?[\s(]*[fF]alse"
)
_OF_DICTIONARIES: Final = frozenset(dir(dict))  # the sandbox says which of these a template may have
_OF_LOOPS: Final = frozenset({"first", "last", "index", "index0", "length", "revindex", "revindex0"})  # numbers, all


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said; it renders as what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # As transformers does: a call block, which has a scope of its own.
        call = self.call_method("_as_it_is")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return str(caller())


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Its answers sooner for what templates ask of every message: a field of a dictionary, how far the loop is."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICTIONARIES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is jinja2.runtime.LoopContext and attribute in _OF_LOOPS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """Unlike jinja2's own, this escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = _now
    return made


class ChatTemplate:
    """One compiled template with its model's special tokens.

    content: "openai" where messages' parts reach the template as lists, "string" where they are joined before.
    inline_system: whether a system message in the middle of a conversation is rendered where it stands.
    low_effort: whether an effort of "low" is a switch of its own, as one family has it; None: that is not known here.
    turns: the same without running it, where it writes each message by itself and there are no variables and no tools.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises SettingsError for a source that jinja2 does not accept."""
        environment = _environment()
        try:
            self._compiled = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise SettingsError(
                f"the chat template does not compile: {error}", "compare the model's folder with the workers'"
            ) from error
        self.source = source
        self._given = {**self._compiled.globals, "documents": None, **(special_tokens or {})}
        self.content: Literal["openai", "string"] = _content_format(source, tree)
        self.inline_system = self._takes_inline_system()
        self.low_effort = _low_effort(source)
        self.turns = Turns.of(environment, tree, {**self._given, "tools": None, "add_generation_prompt": True})

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None, add_generation_prompt: bool = True,
    ) -> str:  # fmt: skip
        """The prompt's text. `variables` go before special tokens of the same name.

        Raises whatever the template raises: jinja2.TemplateError, but also TypeError and the like.
        """
        if self.turns is not None and not variables and tools is None and add_generation_prompt:
            try:
                return self.turns.render(messages)
            except Exception:  # what the template itself makes of them is right, and so is its error
                pass
        given = {**self._given, **variables} if variables else self._given.copy()
        given["messages"], given["tools"], given["add_generation_prompt"] = messages, tools, add_generation_prompt
        # As the template's render() does it, which copies what is given twice more, and notes what its globals are
        # called for templates that include others.
        made = self._compiled
        context = jinja2.runtime.new_context(made.environment, made.name, made.blocks, given, shared=True)
        return "".join(made.root_render_func(context))

    def _takes_inline_system(self) -> bool:
        """SGLang's own probe: no special tokens, no tools, nothing but messages."""
        messages = [
            {"role": "system", "content": "t"}, {"role": "user", "content": "t"},
            {"role": "system", "content": _SENTINEL}, {"role": "user", "content": "t"},
        ]  # fmt: skip
        plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        try:
            rendered = plain.from_string(self.source).render(messages=messages, add_generation_prompt=False)
        except Exception:
            return False
        return _SENTINEL in rendered


def choose(templates: Mapping[str, str], preferred: str | None = None) -> str | None:
    """SGLang's choice among a folder's templates: what its command line names, else the first; None: there is none."""
    if not templates:
        return None
    if preferred is None:
        return next(iter(templates.values()))
    if len(templates) > 1 and preferred not in templates:
        raise SettingsError(f"the folder has no template {preferred!r}", f"it has {', '.join(templates)}")
    return templates.get(preferred, next(iter(templates.values())))


def _low_effort(source: str) -> bool | None:
    if not all(word in source for word in _SWITCH):
        return False
    return None if _EARLIER_FAMILIES.search(source) else True


def _content_format(source: str, tree: jinja2.nodes.Template) -> Literal["openai", "string"]:
    if any(word in source for word in _MEDIA_WORDS):
        return "openai"
    for loop in tree.find_all(jinja2.nodes.For):
        if any(_reads_content(loop.iter, name) for name in ("message", "msg", "m")):
            return "openai"
    return "string"


def _reads_content(node: jinja2.nodes.Node | None, name: str) -> bool:
    """`name.content` or `name["content"]`, through filters, tests and slices."""
    if isinstance(node, jinja2.nodes.Filter | jinja2.nodes.Test):
        return _reads_content(node.node, name)
    if isinstance(node, jinja2.nodes.Getitem):
        if isinstance(node.arg, jinja2.nodes.Slice):
            return _reads_content(node.node, name)
        key = node.arg.value if isinstance(node.arg, jinja2.nodes.Const) else None
    elif isinstance(node, jinja2.nodes.Getattr):
        key = node.attr
    else:
        return False
    return key == "content" and isinstance(node.node, jinja2.nodes.Name) and node.node.name == name
