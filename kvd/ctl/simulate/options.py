"""Options that all of `kvdctl simulate` share."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

TraceOption = Annotated[
    Path,
    typer.Option("--trace", metavar="FILE", help="Requests in Mooncake's format: JSON lines, plain or .gz."),
]


def names(words: str, known: Iterable[str], option: str) -> list[str]:
    """What is given with commas, each once. Raises BadParameter for what is not known."""
    found = [word.strip() for word in words.split(",")]
    unknown = [word for word in found if word not in known]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint=option)
    return list(dict.fromkeys(found))
