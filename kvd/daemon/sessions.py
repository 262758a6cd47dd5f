"""Who is connected: one session per registered connection, with its namespaces and its lease table.

Pure bookkeeping; a session lives exactly as long as its connection.
"""

from dataclasses import dataclass, field
from typing import Protocol

from kvd import wire


class Table(Protocol):
    """A worker's lease table, see kvd.leasetable."""

    def live(self, now: float) -> set[int]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Session:
    """One worker rank, or one tool."""

    id: int
    ticket: bytes
    pid: int
    role: str
    label: str
    since: float
    table: Table | None
    namespaces: list[wire.NamespaceSpec] = field(default_factory=list)
    server: str = ""  # whose rank it is, if it said: see kvd.sglang_info
    circuit: str = "open: not attached yet"  # until it reports otherwise
    counters: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{self.role} {self.label!r} (pid {self.pid}, session {self.id})"


@dataclass(slots=True)
class Sessions:
    """All that are connected."""

    _by_id: dict[int, Session] = field(default_factory=dict)
    _by_ticket: dict[bytes, Session] = field(default_factory=dict)

    def add(self, session: Session) -> None:
        self._by_id[session.id] = session
        self._by_ticket[session.ticket] = session

    def remove(self, session: Session) -> None:
        """Idempotent."""
        self._by_ticket.pop(session.ticket, None)
        if self._by_id.pop(session.id, None) is not None and session.table is not None:
            session.table.close()

    def by_ticket(self, ticket: bytes) -> Session | None:
        return self._by_ticket.get(ticket)

    def all(self) -> list[Session]:
        return list(self._by_id.values())

    def held_places(self, now: float) -> set[int]:
        """What all lease tables hold now."""
        held: set[int] = set()
        for session in self._by_id.values():
            if session.table is not None:
                held |= session.table.live(now)
        return held
