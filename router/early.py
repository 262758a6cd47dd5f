"""Batches of a node that came before those that they follow: kept until it is their turn. Pure.

Bounded by bytes, not by their count: one batch may be of many megabytes. What finds no room is not forgotten: `latest`
has its number, and it is asked for again when all before it has come (kvd.router.view).
"""

from typing import Final

from kvd.brief import Brief

# Of one node: some ten thousand batches as they usually are, which is more than a node sends until what is missing has
# come or is given up; and a router that follows a hundred nodes, all of them behind, has memory for that.
MOST_BYTES: Final = 16 << 20


class Early:
    """By their numbers."""

    def __init__(self) -> None:
        self.latest = -1  # the highest number that came, whether it found room or not
        self._bytes = 0
        self._batches: dict[int, tuple[Brief, int]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __contains__(self, seq: int) -> bool:
        return seq in self._batches

    def put(self, seq: int, batch: Brief, due: bool) -> None:
        """Keep it, if there is room; one that is `due` is always kept: it makes room for others."""
        self.latest = max(self.latest, seq)
        size = batch.weight
        if seq not in self._batches and (due or self._bytes + size <= MOST_BYTES):
            self._batches[seq] = batch, size
            self._bytes += size

    def pop(self, seq: int) -> Brief:
        batch, size = self._batches.pop(seq)
        self._bytes -= size
        return batch

    def drop_through(self, seq: int) -> None:
        """Those up to this number are not needed any more."""
        for old in [one for one in self._batches if one <= seq]:
            self.pop(old)

    def clear(self) -> None:
        """Numbers begin anew."""
        self._batches.clear()
        self.latest, self._bytes = -1, 0
