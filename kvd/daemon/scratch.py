"""Scratch namespaces: pages that leave with the session that wrote them. `kvdctl doctor` tries the daemon with one.

Always true: only a namespace that no session has joined and that holds no page becomes scratch, and nobody else joins
it then; so dropping it takes away only what this session stored. A page that a scan still reads stays, as an
ordinary page that is evicted in its turn.
"""

from kvd import wire
from kvd.daemon.node import Node
from kvd.daemon.sessions import Session
from kvd.errors import Refused


def claim(node: Node, session: Session, specs: list[wire.NamespaceSpec]) -> None:
    """May the session join these? Called before it does; changes nothing. Raises Refused."""
    joined = {spec.digest for other in node.sessions.all() for spec in other.namespaces}
    scratch = {spec.digest for other in node.sessions.all() for spec in other.namespaces if spec.scratch}
    scratch |= {spec.digest for spec in specs if spec.scratch}
    for spec in specs:
        if spec in session.namespaces or spec.digest not in scratch:
            continue
        held = any(group.namespace == spec.digest for group in node.residency)
        if not spec.scratch or spec.digest in joined or held:
            raise Refused("a scratch namespace cannot be shared", "choose a random digest")


def drop(node: Node, session: Session, now: float) -> None:
    """The session has ended and holds nothing any more: forget its scratch pages, leaves first."""
    digests = {spec.digest for spec in session.namespaces if spec.scratch}
    if not digests:
        return
    groups = [group for group in node.residency if group.namespace in digests]
    for group in sorted(groups, key=lambda group: -group.depth):
        if group.held or not group.is_leaf:
            continue
        node.space.drop(group, now)
    for digest in digests:
        node.labels.forget(digest)
