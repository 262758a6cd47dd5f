"""What steering knows of workers when it chooses: the interface; see kvd.router.fleet for what finds it out.

Everything here answers at once, from what was heard before. What is not sure is not credited: a worker without a
`Manner` is chosen by its load alone, and why it has none is the fleet's to say.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvd.router.policies.choice import Matched
from kvd.router.rates import Rates
from kvd.router.tokens.blocks import Scheme
from kvd.router.tokens.requests import Tokeniser


@dataclass(frozen=True, slots=True, eq=False)
class Manner:
    """How a worker makes prompts and names blocks. Workers that do both alike share one: compared by identity."""

    tokeniser: Tokeniser
    scheme: Scheme


class Knowledge(Protocol):
    """Of the workers by their names, which are kvd.router.steering.Worker's."""

    def serving(self, model: str | None) -> Container[str] | None:
        """Who may be asked for what a request calls `model`; None: everybody, as far as is known."""

    def manner(self, worker: str) -> Manner | None:
        """None: no prefix credit."""

    def matched(
        self, chains: Mapping[Manner, Sequence[int]], tokens: int, stored: Mapping[Manner, Sequence[int]]
    ) -> dict[str, Matched]:
        """What every worker has of a prompt of `tokens`; who has nothing of it is left out.

        `chains`: the prompt's block hashes as each manner names them; `stored`: and its pages in kvd's tiers, of those
        manners where that is another chain. `expected` is 0: what is on its way is the caller's to know.
        """

    def rates(self, worker: str) -> Rates:
        """How fast it is; what is observed is told to the same object."""
