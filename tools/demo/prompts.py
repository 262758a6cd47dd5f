"""Real text for the demo: chapters of the Python reference, which is on every machine that has Python."""

from pydoc_data.topics import topics

Messages = list[dict[str, str]]


def chapter(name: str, characters: int) -> str:
    """The beginning of a chapter, as `help()` shows it."""
    return str(topics[name]).strip()[:characters]


def question() -> str:
    """One long prompt for /generate, about 1,300 tokens."""
    text = chapter("try", 5200)
    return f"Read this chapter of a reference manual.\n\n{text}\n\nIn one sentence, this chapter says that"


def conversation() -> tuple[Messages, str]:
    """The first turn of a chat, and what the user says next; about 900 tokens together with the answer."""
    first: Messages = [
        {
            "role": "system",
            "content": "You answer questions about this text in one short sentence.\n\n" + chapter("with", 3000),
        },
        {"role": "user", "content": "What is this statement good for?"},
    ]
    return first, "And when would you rather not use it?"
