"""The shell: turns messages into calls on the node, with the time, and tells members what came of it.

All node work happens on the event loop's thread; others fault memory in and look for GPUs, at start, and write pins.
"""

import asyncio
import gc
import logging
import os
import secrets
import time
from collections.abc import Callable

from kvd import __version__, descriptors, systemd, wire
from kvd.daemon import operators, scratch, status
from kvd.daemon.data import DataSocket
from kvd.daemon.events import Events
from kvd.daemon.lower import open_lower
from kvd.daemon.members import Member, Members, listen
from kvd.daemon.node import Node
from kvd.daemon.pinning import Pinning
from kvd.daemon.removals import Removals
from kvd.daemon.requests import bounded
from kvd.daemon.room import Room
from kvd.daemon.sessions import Session
from kvd.daemon.telemetry import Gpus
from kvd.errors import PeerError, Refused, VersionSkew
from kvd.leasetable import LeaseTableReader
from kvd.places import DATA_SOCKET, SOCKET
from kvd.settings import DaemonSettings
from kvd.sglang_info import MOST_CHARACTERS
from kvd.storage import memory

log = logging.getLogger("kvd")

TICK_S = 0.25
SCAN_TTL_S = 30.0
MAX_SCAN = 256
MAX_WAIT_S = 10.0
CHECK_AT_ONCE = 4096  # pages: some 10 ms of the loop
MAX_FAULTS = 1000  # of one part: a bug that breaks one invariant breaks it everywhere
MAX_CIRCUIT = 1024  # characters of a report's circuit: a reason with its hint and a path
FAULT_STEP_BYTES = 4 << 20  # faulting holds up every other change of the process's mappings


class Shell:
    """Owns the sockets. `close` may be called twice."""

    def __init__(self, settings: DaemonSettings, room: Room) -> None:
        self._settings = settings
        self._room = room
        self._node: Node = room.node
        self._next_session = 1
        self._started = time.monotonic()
        self.prefaulted = 0
        self.closing = False
        path = settings.run_dir / SOCKET
        listener = listen(path, settings.socket_mode)
        self._shortage = ""
        self._gpus = Gpus()
        self._members = Members(listener, settings.max_sessions, self._answer, self._gone, self._crowded)
        self._data = DataSocket(settings.run_dir / DATA_SOCKET, settings.socket_mode, self._answer_worker, self._drop)
        self._by_ticket: dict[bytes, Member] = {}
        self._lower = open_lower(settings, room)
        self._removals = Removals(self._node, self._lower)
        self._pinning = Pinning(self._node)
        self._events: Events | None = None
        if settings.events.endpoint is not None:
            self._events = Events(settings.events, room.epoch, room.node, settings.socket_mode)

    # -- kvd.sock ------------------------------------------------------------------------------------------

    def _answer(self, member: Member, message: wire.ToDaemon, fds: list[int]) -> None:
        session = member.session
        if isinstance(message, wire.Hello):
            if session is not None:
                raise PeerError("a second Hello")
            self._welcome(member, message, fds)
            return
        if not isinstance(session, Session):
            raise PeerError("spoke before Hello")
        match message:
            case wire.Ping(n):
                member.send(wire.Pong(n, self.prefaulted))
            case wire.Join(namespaces, server):
                if len(server) > MOST_CHARACTERS:
                    raise PeerError("an oversized name of a server")
                session.server = server
                scratch.claim(self._node, session, namespaces)
                member.send(wire.Joined(self._node.join(session, namespaces, time.monotonic())))
            case wire.Report(circuit, counters):
                if len(counters) > 256 or len(circuit) > MAX_CIRCUIT:
                    raise PeerError("an oversized report")
                self._node.report(session, circuit, counters)
            case wire.GetStatus():
                member.send(self.status())
            case wire.GetPrefixes(limit):
                member.send(status.prefixes(self._node, limit, time.monotonic()))
            case wire.Scan(cursor, limit):
                member.send(self._scan(session, cursor, limit))
            case wire.EndScan(lease, bad):
                self._node.reading.release(session, lease, bad, time.monotonic())
            case wire.Check(cursor):
                faults, following = self._node.check(cursor, CHECK_AT_ONCE)
                member.send(wire.Checked(faults[:MAX_FAULTS], len(self._node.residency), following))
            case wire.Pin():
                self._pinning.begin(message, member.send)
            case wire.RemoveBelow():
                self._removals.begin(message, member.send)
            case _:
                member.send(operators.answer(self._node, self._lower, message, time.monotonic()))

    def _welcome(self, member: Member, hello: wire.Hello, fds: list[int]) -> None:
        if hello.protocol != wire.PROTOCOL:
            member.send(
                wire.Refusal(
                    f"this kvd ({__version__}) speaks protocol {wire.PROTOCOL}, you speak {hello.protocol}",
                    "install the same kvd version on both sides",
                )
            )
            raise VersionSkew(f"protocol {hello.protocol}")
        if len(hello.label) > 256 or (hello.role == "worker") != (len(fds) == 1):
            raise PeerError("a worker sends one descriptor, a tool none, a label is up to 256 characters")
        table = LeaseTableReader(fds.pop()) if fds else None
        session = Session(
            self._next_session, secrets.token_bytes(wire.TICKET_BYTES), member.pid, hello.role, hello.label,
            time.monotonic(), table,
        )  # fmt: skip
        self._next_session += 1
        member.session = session
        self._node.sessions.add(session)
        self._by_ticket[session.ticket] = member
        welcome = wire.Welcome(
            wire.PROTOCOL, self._room.epoch, session.id, session.ticket,
            f"ipc://{self._settings.run_dir / DATA_SOCKET}", len(self._room.memory.view), self._room.index_bytes,
            __version__,
        )  # fmt: skip
        member.send(welcome, (self._room.memory.fd, self._room.index_fd))
        if hello.role == "worker":
            log.info("attached %r", session)

    def _gone(self, member: Member) -> None:
        session = member.session
        if isinstance(session, Session):
            self._by_ticket.pop(session.ticket, None)
            self._node.bury(session)
            scratch.drop(self._node, session, time.monotonic())
            if session.role == "worker":
                log.info("detached %r", session)

    def _scan(self, session: Session, cursor: int, limit: int) -> wire.Scanned:
        if cursor < 0 or not 1 <= limit <= MAX_SCAN:
            raise PeerError("malformed scan")
        bounded(session, self._node.leases.held_by(session.id))
        return status.scan(self._node, session, cursor, limit, time.monotonic(), SCAN_TTL_S)

    # -- kvd.data ------------------------------------------------------------------------------------------

    def _answer_worker(
        self, ticket: bytes, request: wire.FromWorker, respond: Callable[[wire.ToWorker], None]
    ) -> wire.ToWorker | None:
        session = self._node.sessions.by_ticket(ticket)
        if session is None:
            raise PeerError("no such session")
        now = time.monotonic()
        try:
            match request:
                case wire.LeasePages():
                    return self._lease(session, request, respond, now)
                case wire.ReservePages():
                    return self._node.intake.reserve(session, request, now)
                case wire.CommitPages():
                    return self._node.intake.commit(session, request, now)
                case wire.ReleaseLease(lease, bad):
                    self._node.reading.release(session, lease, bad, time.monotonic())
                    return None
                case wire.Lookup():
                    return self._node.reading.lookup(session, request, now)
        except Refused as refused:
            return wire.Refusal(refused.message, refused.hint, getattr(request, "request", 0))

    def _lease(
        self, session: Session, request: wire.LeasePages, respond: Callable[[wire.ToWorker], None], now: float
    ) -> wire.ToWorker | None:
        """At once, or when the pages that are on their way from below are here, or time is up."""
        coming = self._node.reading.on_the_way(session, request, now)
        if not coming or request.wait_s <= 0:
            return self._node.reading.lease(session, request, now)

        def here() -> None:
            if self._node.sessions.by_ticket(session.ticket) is not session:
                return
            try:
                respond(self._node.reading.lease(session, request, time.monotonic()))
            except PeerError as error:  # out of here it would end the daemon
                self._drop(session.ticket, str(error))

        until = self._node.promotion.wait(coming, now + min(request.wait_s, MAX_WAIT_S), here)
        asyncio.get_running_loop().call_later(until - now + 0.001, self._give_up_waiting)
        return None

    def _give_up_waiting(self) -> None:
        """Somebody's time may be up; ticks are too far apart for deadlines of this kind."""
        self._node.promotion.tick(time.monotonic())

    def _drop(self, ticket: bytes, why: str) -> None:
        member = self._by_ticket.get(ticket)
        if member is not None:
            log.warning("dropped %r: %s", member.session, why)
            member.close()

    def _crowded(self) -> str:
        """Why nobody more can be taken in. ZeroMQ takes connections by itself: it is told here."""
        before, self._shortage = self._shortage, descriptors.shortage()
        self._data.admit(not self._shortage)
        if self._shortage and not before:
            log.warning("%s", self._shortage)
        return self._shortage

    # -- jobs ----------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Expire leases, and tell the service manager that the loop turns."""
        interval_s = systemd.watchdog_interval_s(os.environ, os.getpid())
        while True:
            self._crowded()
            self._node.tick(time.monotonic())
            for below in self._lower:
                below.tick(time.monotonic())
            if self._events is not None:
                self._events.tick(time.monotonic())
            gc.collect(1)
            if interval_s is not None:
                systemd.notify("WATCHDOG=1")
            await asyncio.sleep(min(TICK_S, interval_s or TICK_S))

    async def follow_workers(self) -> None:
        """Find the workers whose prefix events are to be passed on."""
        if self._events is not None:
            await self._events.workers.follow()

    async def remember_pins(self) -> None:
        """Write what operators pin and unpin, and answer them."""
        await self._pinning.answer_forever()

    async def prefault(self) -> None:
        """Fault all memory in, so that no page's first write pays for it."""
        if not self._settings.arena.prefault:
            return
        started = time.monotonic()

        def goes_on(done: int) -> bool:
            self.prefaulted = done
            return not self.closing

        self.prefaulted = await asyncio.to_thread(
            memory.populate, self._room.memory.map, FAULT_STEP_BYTES, True, goes_on
        )
        if self.prefaulted:
            log.info("faulted in %d MiB in %.1f s", self.prefaulted >> 20, time.monotonic() - started)

    def status(self) -> wire.Status:
        return status.status(
            self._node, self._settings, self._room, time.monotonic(), self._started, self.prefaulted,
            self._data.dropped, self._lower, self._shortage, self._gpus.names,
        )  # fmt: skip

    async def flush(self) -> None:
        """Before a clean stop: write what the lower tiers do not have yet, as far as time allows."""
        until = time.monotonic() + self._settings.flush_s
        pairs = list(zip(self._lower, self._node.writebacks, strict=True))
        while any(below.ready and len(writeback) for below, writeback in pairs) and time.monotonic() < until:
            for _, writeback in pairs:
                writeback.tick(time.monotonic(), hurry=True)
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self.closing = True
        for below in self._lower:
            below.close()
        if self._events is not None:
            self._events.close()
        self._members.close()
        self._data.close()
        (self._settings.run_dir / SOCKET).unlink(missing_ok=True)
