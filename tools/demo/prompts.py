"""Real text for the demo: questions about modules of Python's standard library, whose documentation is on every machine."""

import importlib
import inspect

Messages = list[dict[str, str]]


def documentation(module: str, characters: int) -> str:
    """The beginning of what a module says about itself."""
    return inspect.cleandoc(importlib.import_module(module).__doc__ or "")[:characters]


def question() -> str:
    """One long prompt for /generate, about 1,200 tokens."""
    text = documentation("pickletools", 900) + "\n\n" + documentation("decimal", 3200)
    return f"Read this documentation of two Python modules.\n\n{text}\n\nIn one sentence, the first module is for"


def conversation() -> tuple[Messages, str]:
    """The first turn of a chat, and what the user says next; about 900 tokens together with the answer."""
    system = "You answer questions about the following Python module in one short sentence.\n\n"
    first: Messages = [
        {"role": "system", "content": system + documentation("textwrap", 500) + documentation("optparse", 2400)},
        {"role": "user", "content": "What is this module good for?"},
    ]
    return first, "And which of its parts would you use first, and why?"
