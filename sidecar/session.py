"""A worker's session with kvd: one thread attaches, watches, reports, and attaches again after a restart.

The rest of the plugin only reads `attachment` (None: detached) and the circuit. The thread is the one place that
waits for the daemon outside a caller's deadline; it never touches the worker's memory.
"""

import logging
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvd import wire
from kvd.client import Channels, Link
from kvd.errors import KvdError, Refused, Unavailable
from kvd.index import IndexReader
from kvd.leasetable import LeaseTable
from kvd.sidecar import engine
from kvd.sidecar.circuit import Circuit
from kvd.sidecar.memory import bytes_of, map_pages
from kvd.sidecar.pool import Bytes

log = logging.getLogger("kvd.plugin")

ATTACH_TIMEOUT_S = 2.0
PING_EVERY_S = 0.5
STALLED_AFTER_S = 1.0
CLOSE_TIMEOUT_S = 0.5
REPORT_EVERY_S = 1.0
_BACKOFF_S = (0.05, 1.0)  # first, longest
_LASTED_S = 5.0  # an attachment that was none of a kvd that hangs up on us
_MAP_STEP, _MAP_EVERY_MS = 16 << 20, 10


@dataclass(slots=True)
class Attachment:
    """One registered connection. The first `joined` namespaces of `roster` may be used, by their places in it."""

    link: Link
    channels: Channels
    arena: Bytes
    index: IndexReader
    roster: list[wire.NamespaceSpec] | None = None
    joined: int = 0


class Session:
    """Starts its thread with `start`; `close` may be called twice and takes well under a second.

    `specs` answers with one list that only grows, or with another list: then a new connection is made for that.
    """

    def __init__(
        self, socket: Path, label: str, specs: Callable[[], list[wire.NamespaceSpec]], counters: Counter[str]
    ) -> None:
        self.circuit = Circuit()
        self.attachment: Attachment | None = None
        self.leases = LeaseTable()
        self._socket = socket
        self._label = label
        self._specs = specs
        self._counters = counters
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._ending = threading.Lock()  # whoever has it finds `_wake` open, or `_stopping` set
        self._said = ""
        self._thread = threading.Thread(target=self._run, name="kvd-session", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something new to join or to report."""
        with self._ending:
            if not self._stopping:
                os.eventfd_write(self._wake, 1)

    def trip(self, reason: str) -> None:
        """A call missed its deadline or met garbage: open the circuit."""
        if self.circuit.trip(reason, time.monotonic()):
            self._counters["circuit_trips"] += 1
            log.warning("kvd: circuit open, answering misses: %s", reason)
            self.wake()

    def turn_off(self, reason: str) -> None:
        """This worker cannot be cached: stay off for good, and say why."""
        if not self.circuit.off:
            self.circuit.off = reason
            log.error("kvd is OFF for this worker: %s", reason)

    def close(self) -> None:
        with self._ending:
            if self._stopping:
                return
            self._stopping = True
            os.eventfd_write(self._wake, 1)
        self.circuit.trip("closed", time.monotonic())
        if self._thread.is_alive():
            self._thread.join(timeout=CLOSE_TIMEOUT_S)  # in the middle of attaching, it ends on its own
        elif self._thread.ident is None:
            self._clean_up()

    def _clean_up(self) -> None:
        with self._ending:  # else a later wake() would write into whatever has its number by then
            self._stopping = True
            os.close(self._wake)
        self.leases.close()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self._clean_up()

    def _serve(self) -> None:
        wait_s = _BACKOFF_S[0]
        while not self._stopping:
            try:
                attachment = self._attach()
            except (KvdError, OSError) as error:  # OSError: no descriptors are left, and may be later
                self._say(f"detached: {error}")
                self._pause(wait_s)
                wait_s = min(2 * wait_s, _BACKOFF_S[1])
                continue
            began = time.monotonic()
            try:
                self._watch(attachment)
            except KvdError as error:
                self._say(f"detached: {error}")
            except Exception:  # a bug of ours must not end the session thread in silence: detach and start over
                log.exception("kvd: session thread failed; reattaching")
            finally:
                self.circuit.trip("detached", time.monotonic())
                self.attachment = None
                attachment.link.close()
                attachment.channels.close()
                del attachment  # and with it, unless a call still has it, the memory of a kvd that is gone
            lasted = time.monotonic() - began >= _LASTED_S
            wait_s = _BACKOFF_S[0] if lasted else min(2 * wait_s, _BACKOFF_S[1])
            if not lasted:
                self._pause(wait_s)  # a kvd that hangs up at once does so again

    def _attach(self) -> Attachment:
        link = Link(self._socket, "worker", self._label, self.leases.fd, ATTACH_TIMEOUT_S)
        try:
            attachment = Attachment(link, Channels(link.welcome), bytes_of(link.arena), link.index)
        except BaseException:
            link.close()
            raise
        self.attachment = attachment
        self._counters["attached"] += 1
        self._say(f"attached to kvd {link.welcome.version} at {self._socket}")
        return attachment

    def _watch(self, attachment: Attachment) -> None:
        """Until the daemon hangs up or we stop: join, ping, report."""
        link = attachment.link
        poll = select.poll()
        poll.register(link.sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        pings, sent_at, answered, reported_at, mapped, faulted = 0, 0.0, True, 0.0, 0, 0
        while not self._stopping:
            now = time.monotonic()
            if answered:
                self._join(attachment)
                now = time.monotonic()
            if answered and now - sent_at >= PING_EVERY_S:
                pings, sent_at, answered = pings + 1, now, False
                link.send(wire.Ping(pings))
                if now - reported_at >= REPORT_EVERY_S:
                    reported_at = now
                    link.send(wire.Report(str(self.circuit)[:1000], dict(self._counters)))
            if not answered and now - sent_at > STALLED_AFTER_S:
                self.trip("kvd does not answer")
            mapped = self._map(attachment, mapped, faulted)
            pause_ms = _MAP_EVERY_MS if mapped < faulted else 1000 * PING_EVERY_S if answered else 100
            for fd, _ in poll.poll(pause_ms):
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                    sent_at = min(sent_at, time.monotonic() - PING_EVERY_S) if answered else sent_at
                else:
                    pong = link.receive(wire.Pong, time.monotonic() + STALLED_AFTER_S)
                    if pong.n == pings:
                        answered = True
                        if self.circuit.proved(sent_at):
                            log.info("kvd: circuit closed")
                            reported_at = 0.0
                    faulted = min(pong.faulted_bytes, attachment.arena.nbytes) & ~4095

    def _join(self, attachment: Attachment) -> None:
        specs = self._specs()
        if attachment.roster is None:
            attachment.roster = specs
        if attachment.roster is not specs:  # a session's namespaces only grow: others need another session
            raise Unavailable("the namespaces of weights that are gone are forgotten")
        if len(specs) <= attachment.joined:
            return
        try:
            ids = attachment.link.ask(wire.Join(specs, engine.server()), wire.Joined, ATTACH_TIMEOUT_S).ids
        except Refused as refused:
            self.turn_off(str(refused))
            return
        if ids != list(range(len(specs))):
            raise Unavailable(f"kvd numbered our namespaces {ids}")
        attachment.joined = len(specs)
        for spec in specs:
            log.info(
                "kvd: namespace %s holds %s, shard %d/%d", spec.digest.hex(), spec.pool, spec.shard + 1, spec.shards
            )

    @staticmethod
    def _map(attachment: Attachment, mapped: int, faulted: int) -> int:
        """Enter what the daemon has faulted in into our page tables, a step per call."""
        end = min(faulted, mapped + _MAP_STEP)
        if end > mapped and not map_pages(attachment.arena, mapped, end):
            return faulted  # this kernel cannot: pages are mapped when they are first used
        return max(end, mapped)

    def _pause(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if poll.poll(seconds * 1000):
            os.eventfd_read(self._wake)

    def _say(self, what: str) -> None:
        if what != self._said:
            self._said = what
            log.info("kvd: %s", what)
