"""What a worker has to do, as the router believes it, and what its engine says of that: the figures. Pure."""

from typing import NamedTuple

import msgspec

from kvd.router.work import NO_WORK, Work


class Load(msgspec.Struct, frozen=True, gc=False):
    """One worker, now."""

    queued: Work = NO_WORK  # sent and not prefilled
    head: Work = NO_WORK  # of the next that will have its first token
    head_at: float = 0.0  # since when that is being computed; says nothing where nothing waits
    running: int = 0  # have their first token, not their last
    context_tokens: int = 0  # of those
    free_tokens: int | None = None  # of KV memory when all that waits is in; below zero: some wait; None: not known
    held_tokens: int = 0  # by those that run: less than their contexts where they have prefixes in common

    @property
    def requests(self) -> int:
        return self.queued.prompts + self.running


class Report(NamedTuple):
    """What an engine says of itself: `/v1/loads`, or what it publishes. Absent figures are None."""

    made_at: float
    running: int
    waiting: int
    waiting_tokens: int  # that must be computed
    used_tokens: int  # of KV memory, cached prefixes that may leave not counted
    most_tokens: int
