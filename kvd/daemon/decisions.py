"""What the gate decided lately, for `kvdctl explain`: a ring of the last few hundred. Pure: time is a number.

Always true: at most `MOST` are kept, whatever workers ask for; `total` counts those that fell out too.
"""

from collections import deque
from itertools import islice
from typing import Final, NamedTuple

from kvd.daemon.gate import Decision
from kvd.daemon.sessions import Session

MOST: Final = 512


class Made(NamedTuple):
    """A decision, for whom and about which tier (its bit). The worker may have left since."""

    at: float
    session: int
    pid: int
    worker: str
    pool: str
    tier: int
    decision: Decision


class Decisions:
    """The last decisions, the newest first."""

    def __init__(self) -> None:
        self._made: deque[Made] = deque(maxlen=MOST)
        self.total = 0

    def __len__(self) -> int:
        return len(self._made)

    def add(self, now: float, session: Session, pool: str, tier: int, decision: Decision) -> None:
        self._made.appendleft(Made(now, session.id, session.pid, session.label, pool, tier, decision))
        self.total += 1

    def last(self, count: int) -> list[Made]:
        """Up to `count`, the newest first."""
        return list(islice(self._made, max(0, count)))
