"""The members of the fleet: workers, how each came, and whether it stays. Pure.

    joining ───asked────► serving ◄──► unhealthy          draining ──has nothing left──► gone
       └───────────────────┴── drain ─────┴────────────────►┘ ▲ remove, from any state: at once

An operator's word (settings, add, drain, remove) goes before a node's announcement. Nothing of this is written down:
a router that starts anew has the members of its settings, and those that its nodes announce.
"""

from typing import Literal

import msgspec

State = Literal["joining", "serving", "unhealthy", "draining", "gone"]
Origin = Literal["configured", "added", "announced"]
GONE_AFTER_S = 10.0  # without an answer, for one that its node announces no more


def state_of(draining: bool, asked: bool, well: bool) -> State:
    """`asked`: what it is, whether or not it said so. `well`: it answers as it should."""
    if draining:
        return "draining"
    if not well:
        return "unhealthy"
    return "serving" if asked else "joining"


class MemberView(msgspec.Struct, frozen=True):
    """A member as people see it. `credit`: prefixes count for it, else `why` not and what to do about it."""

    name: str
    state: State
    origin: Origin
    model: str
    node: str  # where its node's stream is followed; "" where none tells of it
    credit: bool
    why: str
    remedy: str
    health: str  # what is wrong with it; "" where it is well
    parity: str  # "unknown", "equal" or "differs": its tokens and ours
    running: int  # requests that it has of this router's process
