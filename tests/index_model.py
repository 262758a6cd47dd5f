"""The plainest index there could be: a set of hashes for each holder."""

from collections.abc import Container, Sequence


class SetIndex:
    """`held`: holder -> hash -> its parent."""

    def __init__(self) -> None:
        self.held: dict[int, dict[int, int | None]] = {}

    def store(self, holder: int, parent: int | None, hashes: Sequence[int]) -> None:
        blocks = self.held.setdefault(holder, {})
        for value in hashes:
            blocks[value] = parent
            parent = value

    def store_all(self, holder: int, stretches: Sequence[tuple[int | None, Sequence[int]]]) -> None:
        for parent, hashes in stretches:
            self.store(holder, parent, hashes)

    def remove(self, holder: int, hashes: Sequence[int]) -> None:
        for value in hashes:
            self.held.get(holder, {}).pop(value, None)

    def clear(self, holder: int) -> None:
        self.held.pop(holder, None)


def leading(held: Container[int], chain: Sequence[int]) -> int:
    """How many blocks of a chain are held from the first on."""
    return next((at for at, block in enumerate(chain) if block not in held), len(chain))
