"""What every worker has of a prompt, by tier: from what the index says of holders. Pure.

A worker has what lies on its own GPU and in its own host memory, and what its node's kvd keeps in tiers below, in a
namespace of its model. Nothing is credited that the node does not know exactly, or that the index did not take whole:
what is not sure to be there is computed, not waited for.

Of a worker with several data-parallel ranks the one that has most counts: SGLang's own dispatcher decides between
them, so this may say too much for such workers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from kvd import wire
from kvd.router.numbering import Place
from kvd.router.policies.choice import Matched
from kvd.sglang_events import GPU

_TIERS: Final = {GPU: 0, "CPU_PINNED": 1, wire.RAM: 1, wire.NVME: 2, wire.SHARED: 3}  # where in Matched


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as its node knows it. `namespaces`: those of the node's kvd that it can load from, in hex."""

    node: str
    worker: str  # its URL there
    block_tokens: int
    namespaces: frozenset[str] = frozenset()


class Members:
    """Workers that name blocks alike, by where what they may use lies."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self.of_worker: dict[tuple[str, str], list[tuple[str, int]]] = {}  # (node, URL there) -> names, block tokens
        self.of_node: dict[tuple[str, str], list[tuple[str, int]]] = {}  # (node, namespace)
        for name, member in members.items():
            self.of_worker.setdefault((member.node, member.worker), []).append((name, member.block_tokens))
            for namespace in member.namespaces:
                self.of_node.setdefault((member.node, namespace), []).append((name, member.block_tokens))


def matched(
    found: Mapping[int, int], sure: Callable[[int], Place | None], members: Members, tokens: int
) -> dict[str, Matched]:
    """Leading tokens of a prompt of `tokens` by worker and tier; workers that have nothing are left out.

    `found`: leading blocks by holder, from `Index.match`. `sure`: where a holder is, if all that it said is known.
    """
    of_worker, of_node = members.of_worker, members.of_node
    has: dict[str, list[int]] = {}  # tokens by tier
    for number, blocks in found.items():
        where = sure(number)
        if where is None or (tier := _TIERS.get(where.medium)) is None:
            continue
        node, worker, _, namespace, _ = where
        for name, block_tokens in (of_worker.get((node, worker)) if worker else of_node.get((node, namespace))) or ():
            there = blocks * block_tokens
            if there > tokens:
                there = tokens
            tiers = has.get(name)
            if tiers is None:
                tiers = has[name] = [0, 0, 0, 0]
            if there > tiers[tier]:
                tiers[tier] = there
    return {name: Matched(*tiers) for name, tiers in has.items()}
