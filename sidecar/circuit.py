"""The circuit between a worker and kvd: closed while kvd answers in time, open otherwise. Pure: time is a number.

Open means every call is a miss at once, so that a stalled daemon costs a worker one deadline and not one per
request. It closes again by proof: an answer to a ping that was sent after it opened.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Circuit:
    """`off` is for good: the plugin found that it cannot cache this worker safely."""

    off: str = ""
    reason: str = "not attached yet"
    opened_at: float = 0.0
    trips: int = 0

    @property
    def closed(self) -> bool:
        return not self.reason and not self.off

    def trip(self, reason: str, now: float) -> bool:
        """Open; True when it was closed."""
        fresh = self.closed
        self.trips += fresh
        self.reason, self.opened_at = reason, now
        return fresh

    def proved(self, sent_at: float) -> bool:
        """An answer came to something sent at `sent_at`; True when that closed the circuit."""
        if self.closed or self.off or sent_at < self.opened_at:
            return False
        self.reason = ""
        return True

    def __str__(self) -> str:
        if self.off:
            return f"off: {self.off}"
        return f"open: {self.reason}" if self.reason else "closed"
