"""Tables as lines of text, for a terminal of any width. Pure.

Always true: no cell is broken but those of the last column, and of those no word, so that a URL or an id can be copied
as it stands. Where a row is wider than the terminal, the columns that do not fit go on below it, indented, and so do
their names below the first ones.
"""

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Final

_BETWEEN: Final = "  "
_INDENT: Final = "    "  # of what did not fit beside the columns above it
_FOLDED: Final = 24  # the last column is not made narrower than this: it goes below instead


def laid_out(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], width: int | None
) -> tuple[list[str], list[str]]:
    """The lines of the heading, and those of the rows. `right`: which columns are aligned there. Without a width each
    row is one line."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    longest = max((len(word) for row in (columns, *rows) for word in row[-1].split()), default=0)
    levels = list(_levels(widths, min(widths[-1], max(_FOLDED, longest)), width))

    def lines(cells: Sequence[str]) -> Iterator[str]:
        for level in levels:
            indent = _INDENT if level.start else ""
            shown = [
                cells[at].rjust(widths[at]) if right[at] else cells[at].ljust(widths[at])
                for at in level
                if at < len(cells) - 1
            ]  # fmt: skip
            before = indent + "".join(cell + _BETWEEN for cell in shown)
            last = "" if level.stop < len(cells) else cells[-1].rjust(widths[-1]) if right[-1] else cells[-1]
            more = []
            if width is not None and len(before) + len(last) > width:
                room = max(_FOLDED, width - len(before))
                last, *more = wrap(last, room, break_long_words=False, break_on_hyphens=False) or [""]
            line = (before + last).rstrip()
            if line or not level.start:  # no empty line below a row
                yield line
            for part in more:
                yield " " * len(before) + part

    return list(lines(columns)), [line for row in rows for line in lines(row)]


def _levels(widths: Sequence[int], folded: int, width: int | None) -> Iterator[range]:
    """Which columns stand beside each other. `folded`: how narrow the last one may be. Each level has one at least,
    however narrow the terminal is."""
    first, used = 0, 0
    for at, wide in enumerate(widths):
        needed = folded if at == len(widths) - 1 else wide
        if width is not None and at > first and used + needed > width:
            yield range(first, at)
            first, used = at, len(_INDENT)
        used += wide + len(_BETWEEN)
    yield range(first, len(widths))
