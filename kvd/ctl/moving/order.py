"""The order to store pages in: parents first, and what follows one another together. Pure."""

from collections.abc import Iterator, Sequence

from kvd.storage.tier import Page


def runs(pages: Sequence[Page]) -> Iterator[list[int]]:
    """Positions of all pages, in runs in which each page's parent is the one before; no page before its parent.

    A page whose parent is not among them, or is its own descendant (nobody honest makes that), begins a run.
    """
    positions = {page.name: position for position, page in enumerate(pages)}
    children: dict[int, list[int]] = {}
    tops: list[int] = []
    for position, page in enumerate(pages):
        parent = positions.get(page.namespace + page.parent)
        if parent is None:
            tops.append(position)
        else:
            children.setdefault(parent, []).append(position)
    seen = bytearray(len(pages))
    for top in (*tops, *range(len(pages))):
        todo = [top]
        run: list[int] = []
        while todo:
            position = todo.pop()
            if seen[position]:
                continue
            seen[position] = 1
            if run and positions.get(pages[position].namespace + pages[position].parent) != run[-1]:
                yield run
                run = []
            run.append(position)
            todo += reversed(children.get(position, ()))
        if run:
            yield run
