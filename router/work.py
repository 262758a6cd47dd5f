"""What prefill and decode have to do, in the terms that their time is linear in. Pure.

`Request` is a prompt as the router knows it; `Work` is what computing some of it takes.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Request(NamedTuple):
    """A prompt: its length and the chained hashes of its whole blocks, first to last."""

    id: str
    tokens: int
    chain: Sequence[int]
    block_tokens: int


class Work(NamedTuple):
    """Prefill: how many prompts, their tokens that are computed, and what those look at (token pairs)."""

    prompts: int = 0
    tokens: int = 0
    pairs: float = 0.0

    @classmethod
    def of(cls, tokens: int, cached: int) -> "Work":
        """A prompt of which `cached` tokens need not be computed. The last one always is."""
        if cached >= tokens:
            cached = tokens - 1
        new = tokens - cached
        return cls(1, new, new * (cached + new / 2))

    def plus(self, other: "Work") -> "Work":
        return Work(self.prompts + other.prompts, self.tokens + other.tokens, self.pairs + other.pairs)

    def minus(self, other: "Work") -> "Work":
        """Never below nothing."""
        return Work(
            max(0, self.prompts - other.prompts),
            max(0, self.tokens - other.tokens),
            max(0.0, self.pairs - other.pairs),
        )

    def rest(self, done: int) -> "Work":
        """Of one prompt, when `done` of its tokens have been computed."""
        left = max(0, self.tokens - done)
        if not left:
            return NO_WORK
        cached = self.pairs / self.tokens - self.tokens / 2
        return Work(self.prompts, left, left * (cached + self.tokens - left / 2))


NO_WORK = Work()
