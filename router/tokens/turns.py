"""Templates that write every message by itself: those are put together from texts, without being run. Pure.

ChatML and its kin are one loop over the messages. What they write of a message depends on nothing but its role, on
whether it is the first, and on the first one's role; its content stands in it as it is. That is read from the
template's own tree, by a list of what may occur: where anything else does (a filter, a call, an assignment, a look at
another message), the template is no such one. What stands around the contents is asked of the template once a role.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import jinja2
from jinja2 import nodes

_CONTENT: Final = "\0kvd: a content\0"
_PURE: Final = (
    nodes.Add, nodes.And, nodes.Compare, nodes.Concat, nodes.CondExpr, nodes.Const, nodes.Getattr, nodes.Getitem,
    nodes.List, nodes.Name, nodes.Not, nodes.Operand, nodes.Or, nodes.TemplateData, nodes.Test, nodes.Tuple,
)  # fmt: skip
_MOST_ROLES: Final = 64

Around = Sequence[str]  # what a message's content stands between; it may be written more than once, or not at all


class Turns:
    """One template of that kind, rendered with the same variables every time."""

    def __init__(
        self, environment: jinja2.Environment, tree: nodes.Template, at: int, given: Mapping[str, Any]
    ) -> None:
        """`at`: which of the tree's nodes is the loop."""
        parts = tree.body[:at], tree.body[at : at + 1], tree.body[at + 1 :]
        trees = [nodes.Template(part, lineno=1) for part in parts]
        for each in trees:
            each.set_environment(environment)
        before, self._loop, after = map(environment.from_string, trees)
        self._given = given
        self._head, self._tail = before.render(given), after.render(given)
        self._around: dict[tuple[str, str | None], Around] = {}

    @classmethod
    def of(cls, environment: jinja2.Environment, tree: nodes.Template, given: Mapping[str, Any]) -> "Turns | None":
        """None where the template is not of that kind, or refuses such variables."""
        loops = [at for at, node in enumerate(tree.body) if isinstance(node, nodes.For)]
        if len(loops) != 1 or not _by_itself(tree.body[loops[0]]):
            return None
        rest = (node for at, node in enumerate(tree.body) if at != loops[0])
        if not all(_writes(node, "") for node in rest):
            return None
        try:
            return cls(environment, tree, loops[0], given)
        except Exception:  # whatever a template raises; it will again where it is run
            return None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Raises what the template raises, or AttributeError for a content that is no text."""
        first = messages[0]["role"]
        opening = messages[0]["content"].join(self._of(first, None))
        turns = [message["content"].join(self._of(first, message["role"])) for message in messages[1:]]
        return "".join([self._head, opening, *turns, self._tail])

    def _of(self, first: str, role: str | None) -> Around:
        """Around a content of this role's, or of the first message's."""
        known = self._around.get((first, role))
        return known if known is not None else self._asked(first, role)

    def _asked(self, first: str, role: str | None) -> Around:
        messages = [{"role": first, "content": _CONTENT}]
        text = self._loop.render({**self._given, "messages": messages})
        if role is not None:
            messages.append({"role": role, "content": _CONTENT})
            text = self._loop.render({**self._given, "messages": messages})[len(text) :]
        around = text.split(_CONTENT)
        if len(self._around) < _MOST_ROLES:
            self._around[first, role] = around
        return around


def _by_itself(loop: nodes.Node) -> bool:
    """Whether it goes over the messages, and writes each by itself."""
    return (
        isinstance(loop, nodes.For)
        and isinstance(loop.iter, nodes.Name)
        and loop.iter.name == "messages"
        and isinstance(loop.target, nodes.Name)
        and loop.target.name not in ("loop", "messages")
        and not (loop.test or loop.else_ or loop.recursive)
        and all(_writes(node, loop.target.name) for node in loop.body)
    )


def _writes(node: nodes.Node, message: str) -> bool:
    """Whether a statement only writes: the content as it is, and what is fixed; `message`: its name, "" for none."""
    if isinstance(node, nodes.Output):
        return all(_written(each, message) for each in node.nodes)
    branches: Iterable[nodes.Node] = ()
    if isinstance(node, nodes.If):
        branches = (*node.body, *node.elif_, *node.else_)
    return (
        isinstance(node, nodes.If) and _fixed(node.test, message) and all(_writes(each, message) for each in branches)
    )


def _written(node: nodes.Node, message: str) -> bool:
    """Whether in what is written the content stands as it is."""
    if isinstance(node, nodes.Add | nodes.Concat):
        return all(_written(each, message) for each in node.iter_child_nodes())
    return _path(node) == (message, "content") or _fixed(node, message)


def _fixed(node: nodes.Node, message: str) -> bool:
    """Whether it depends on nothing but the roles of this message and the first, and on whether this is the first."""
    if message and _path(node) in ((message, "role"), ("loop", "first"), ("messages", 0, "role")):
        return True
    if isinstance(node, nodes.Name):
        return node.name not in (message, "loop", "messages")
    return isinstance(node, _PURE) and all(_fixed(each, message) for each in node.iter_child_nodes())


def _path(node: nodes.Node) -> tuple[Any, ...]:
    """A name and the constants it is followed by: `messages[0].role` is ("messages", 0, "role"). Else ()."""
    if isinstance(node, nodes.Name):
        return (node.name,)
    if isinstance(node, nodes.Getattr):
        step: Any = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        step = node.arg.value
    else:
        return ()
    owner = _path(node.node)
    return (*owner, step) if owner else ()
