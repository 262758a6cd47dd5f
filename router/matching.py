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


def matched(
    found: Mapping[int, int], place: Callable[[int], Place | None], sure: Callable[[int], bool],
    members: Mapping[str, Member], tokens: int,
) -> dict[str, Matched]:  # fmt: skip
    """Leading tokens of a prompt of `tokens` by worker and tier; workers that have nothing are left out.

    `found`: leading blocks by holder, from `Index.match`. `sure`: whether all that this holder said is known.
    """
    of_worker: dict[tuple[str, str], list[int]] = {}  # (node, URL there) -> blocks by tier
    of_node: dict[str, dict[str, list[int]]] = {}  # and by namespace
    for number, blocks in found.items():
        where = place(number)
        if where is None or (tier := _TIERS.get(where.medium)) is None or not sure(number):
            continue
        if where.worker:
            has = of_worker.setdefault((where.node, where.worker), [0, 0, 0, 0])
        else:
            has = of_node.setdefault(where.node, {}).setdefault(where.namespace, [0, 0, 0, 0])
        has[tier] = max(blocks, has[tier])
    result: dict[str, Matched] = {}
    for name, member in members.items():
        own = of_worker.get((member.node, member.worker))
        pages = of_node.get(member.node)
        if pages is not None:
            for namespace in member.namespaces:
                if (there := pages.get(namespace)) is not None:
                    own = there if own is None else list(map(max, own, there))
        if own is not None:
            each = member.block_tokens
            result[name] = Matched(*[min(blocks * each, tokens) if blocks else 0 for blocks in own])
    return result
