"""Which of a node's workers is which of the router's, and whose pages are in the node's own tiers. Pure.

By what the worker itself states, as each of the two has asked it: its `life` (kvd.sglang_info). Not by URL: a node
knows its workers as 127.0.0.1, and so does every other node. A worker is credited with the node's tiers where the node
says that its plugin is attached with a namespace of theirs.

No credit, and a reason, where it is not certain: a worker whose life is also another worker's, or that names none; one
that no node tells of, or that names its blocks otherwise; a model with side pools, of which a hit needs more than the
KV pages that are told of.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from kvd import wire
from kvd.router.matching import Member
from kvd.router.steering import worker_at
from kvd.router.tokens.blocks import Format

_KV: Final = "kv"
_HERE: Final = ("localhost", "127.", "::1", "0.0.0.0", "::")


class Stated(NamedTuple):
    """What a worker of the router's says of itself."""

    life: str
    block_tokens: int
    format: Format = "default"


class Link(NamedTuple):
    """The worker as a node knows it, or None and why."""

    member: Member | None
    why: str = ""
    remedy: str = ""


UNTOLD: Final = Link(None, "no node tells of its blocks", "name it in events.workers of its node's kvd.toml")


def links(workers: Mapping[str, Stated], nodes: Mapping[str, Iterable[wire.Source]]) -> dict[str, Link]:
    """By the workers' names. Where two nodes tell of one worker, the first does."""
    lives = Counter(stated.life for stated in workers.values())
    told: dict[str, tuple[str, wire.Source]] = {}
    pages: dict[tuple[str, str], list[wire.Source]] = {}  # (node, a worker's URL there) -> what it is attached with
    known_at: dict[str, str] = {}  # by their URLs, which the nodes of workers that have started anew know already
    for node, sources in nodes.items():
        for source in sources:
            if source.worker and source.life:
                first, _ = told.setdefault(source.life, (node, source))
                if source.strange and first == node:
                    told[source.life] = node, source  # one rank's names are all ranks'
                if (url := seen_from_here(source.worker, node)) is not None:
                    known_at[url] = node
            for attached in () if source.worker else source.workers:
                pages.setdefault((node, attached), []).append(source)
    return {
        name: _link(stated, lives[stated.life], told.get(stated.life), pages, known_at.get(name, ""))
        for name, stated in workers.items()
    }


def _link(
    stated: Stated, lives: int, told: tuple[str, wire.Source] | None,
    pages: Mapping[tuple[str, str], list[wire.Source]], known_at: str,
) -> Link:  # fmt: skip
    if not stated.life:
        return Link(None, "its /server_info states nothing that tells it from others", "upgrade SGLang")
    if lives > 1:
        return Link(
            None, "another worker states the same port, seed and start",
            "is it one server under two URLs? if not, give each a --random-seed of its own",
        )  # fmt: skip
    if told is None and known_at:
        return Link(
            None, "its node knows another start of it",
            f"its node asks it again by and by; if it stays so: see the log of the kvd whose events are at {known_at}",
        )  # fmt: skip
    if told is None:
        return UNTOLD
    node, source = told
    if source.block_tokens not in (0, stated.block_tokens):
        return Link(None, f"its node takes its blocks for {source.block_tokens} tokens, not {stated.block_tokens}")
    if source.strange and stated.format == "default":  # in the other one names depend on what events do not say
        return Link(
            None, "its events name blocks otherwise than their tokens tell",
            "does this kvd know that release of SGLang? its README says which",
        )  # fmt: skip
    mine = pages.get((node, source.worker), [])
    if any(one.pool != _KV for one in mine):
        mine = []
    namespaces = frozenset(one.namespace for one in mine if one.block_tokens == stated.block_tokens)
    return Link(Member(node, source.worker, stated.block_tokens, namespaces))


@functools.lru_cache(4096)
def seen_from_here(url: str, node: str) -> str | None:
    """A node's URL of a worker, as the router reaches it: what is local there is at the node's own address.

    None for what is no worker's URL.
    """
    try:
        there, at = worker_at(url), urlsplit(node)
        host = there.host
        if host.startswith(_HERE) and at.scheme == "tcp" and at.hostname and not at.hostname.startswith(_HERE):
            host = at.hostname
        shown = f"[{host}]" if ":" in host else host
        return worker_at(f"http://{shown}:{there.port}").name  # the node's own is of the settings
    except ValueError:
        return None
