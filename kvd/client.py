"""The peer's side of kvd's sockets: what the worker's plugin, kvdctl and the benchmarks build on.

Every call has a deadline and raises Unavailable or DeadlineMissed; nothing here retries or logs.
A `Link` belongs to one thread. A `Channel` is used by one thread at a time; `Channels` lends them.
"""

import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import zmq

from kvd import wire
from kvd.errors import DeadlineMissed, PeerError, Refused, Unavailable
from kvd.index import IndexReader

R = TypeVar("R", bound=wire.Message)
_ZMQ_DESCRIPTORS = 16  # more than a context and its first socket take


class Link:
    """A registered connection to kvd.sock, with the arena and the index mapped."""

    def __init__(
        self, path: Path, role: Literal["worker", "tool"], label: str, lease_fd: int | None, timeout_s: float
    ) -> None:
        self._inbox = bytearray()
        try:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"no socket can be made: {error}", "raise the limit of open files") from error
        fds: list[int] = []
        try:
            self.sock.settimeout(timeout_s)
            self.sock.connect(str(path))
            hello = wire.frame(wire.Hello(wire.PROTOCOL, role, label))
            socket.send_fds(self.sock, [hello], [] if lease_fd is None else [lease_fd])
            data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 2)
            self._inbox += data
            self.welcome = self.receive(wire.Welcome, time.monotonic() + timeout_s)
            if len(fds) != 2:
                raise PeerError("kvd sent no descriptors")
            self.arena = mmap.mmap(fds[0], self.welcome.arena_bytes)
            self.index_map = mmap.mmap(fds[1], self.welcome.index_bytes, prot=mmap.PROT_READ)
            self.index = IndexReader(memoryview(self.index_map))
        except (OSError, ValueError) as error:
            self.sock.close()
            if isinstance(error, TimeoutError):
                raise DeadlineMissed(f"kvd did not answer at {path} within {timeout_s} s", "is it stopped?") from error
            raise Unavailable(f"no kvd at {path}: {error}", "start kvd, or correct the socket's path") from error
        except BaseException:
            self.sock.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def send(self, message: wire.Message) -> None:
        """Raises Unavailable."""
        try:
            self.sock.sendall(wire.frame(message))
        except OSError as error:
            raise Unavailable(f"kvd hung up: {error}") from error

    def receive(self, kind: type[R], deadline: float) -> R:
        """The next message, which must be of this kind. Raises Refused, DeadlineMissed, Unavailable, PeerError."""
        message = wire.decode_from_daemon(self._frame(deadline))
        if isinstance(message, wire.Refusal):
            raise Refused(message.reason, message.hint)
        if not isinstance(message, kind):
            raise PeerError(f"kvd sent {type(message).__name__}, not {kind.__name__}")
        return message

    def ask(self, message: wire.Message, kind: type[R], timeout_s: float) -> R:
        """Send and wait for the answer."""
        self.send(message)
        return self.receive(kind, time.monotonic() + timeout_s)

    def _frame(self, deadline: float) -> bytes:
        while True:
            if len(self._inbox) >= wire.FRAME.size:
                (length,) = wire.FRAME.unpack_from(self._inbox)
                if length > wire.MAX_REPLY_BYTES:
                    raise PeerError(f"kvd sent a frame of {length} bytes")
                end = wire.FRAME.size + length
                if len(self._inbox) >= end:
                    body = bytes(self._inbox[wire.FRAME.size : end])
                    del self._inbox[:end]
                    return body
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineMissed("kvd did not answer in time")
            self.sock.settimeout(left)
            try:
                data = self.sock.recv(1 << 20)
            except TimeoutError as error:
                raise DeadlineMissed("kvd did not answer in time") from error
            except OSError as error:
                raise Unavailable(f"kvd hung up: {error}") from error
            if not data:
                raise Unavailable("kvd hung up")
            self._inbox += data

    def close(self) -> None:
        """Hang up; the daemon frees all this session held. The mappings live as long as something uses them."""
        self.sock.close()


class Channel:
    """One DEALER to kvd.data. Once `gone_fd` is readable nobody will answer: ZeroMQ itself hides a peer's death."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, identity: bytes, gone_fd: int
    ) -> None:
        self._socket = context.socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 64), (zmq.RCVHWM, 64), (zmq.RECONNECT_IVL, 20)):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.connect(endpoint)
        self._gone_fd = gone_fd
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(gone_fd, zmq.POLLIN)
        self._request = 0

    def ask(self, make: Callable[[int], wire.FromWorker], kind: type[R], timeout_s: float) -> R:
        """Send `make(request id)` and wait for its answer. After an error the channel must be closed."""
        self._request += 1
        deadline = time.monotonic() + timeout_s
        self.tell(make(self._request))
        while True:
            left_ms = int((deadline - time.monotonic()) * 1000)
            ready = self._poller.poll(left_ms) if left_ms > 0 else []
            if not ready:
                raise DeadlineMissed(f"kvd did not answer within {timeout_s} s")
            if any(which == self._gone_fd for which, _ in ready):
                raise Unavailable("kvd hung up")
            try:
                reply = wire.decode_to_worker(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                continue
            except zmq.ZMQError as error:
                raise Unavailable(f"kvd is gone: {error}") from error
            if reply.request != self._request:
                continue  # the answer to an earlier request that had timed out
            if isinstance(reply, wire.Refusal):
                raise Refused(reply.reason, reply.hint)
            if not isinstance(reply, kind):
                raise PeerError(f"kvd sent {type(reply).__name__}, not {kind.__name__}")
            return reply

    def tell(self, message: wire.FromWorker) -> None:
        """Send without an answer; never blocks. Raises DeadlineMissed when the daemon takes nothing any more."""
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise DeadlineMissed("kvd takes no messages") from error

    def close(self) -> None:
        self._socket.close()


class Channels:
    """A session's channels, lent to threads. A channel that saw an error is closed, not returned.

    Whoever holds the session's link calls `close` when the daemon hangs up: who waits for an answer is told at once.
    """

    def __init__(self, welcome: wire.Welcome) -> None:
        self._welcome = welcome
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._idle: list[Channel] = []
        self._gone_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._made = 0
        self._lent = 0
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def lend(self) -> Iterator[Channel]:
        """Raises Unavailable after `close`, and when another channel cannot be made."""
        with self._lock:
            if self._closed:
                raise Unavailable("detached from kvd")
            channel = self._idle.pop() if self._idle else self._make()
            self._lent += 1
        sound = False
        try:
            yield channel
            sound = True
        except Refused:
            sound = True
            raise
        finally:
            with self._lock:
                self._lent -= 1
                if sound and not self._closed:
                    self._idle.append(channel)
                else:
                    channel.close()
                    self._finish()

    def _make(self) -> Channel:
        self._made += 1
        identity = self._welcome.ticket + self._made.to_bytes(4, "little")
        spare: list[int] = []
        try:
            # libzmq aborts the whole process where it gets no descriptor for a thread's mailbox.
            while len(spare) < _ZMQ_DESCRIPTORS:
                spare.append(os.dup(self._gone_fd))
        except OSError as error:
            raise Unavailable(f"no channel can be made: {error}", "raise the limit of open files") from error
        finally:
            for fd in spare:
                os.close(fd)
        return Channel(self._context, self._welcome.data_endpoint, identity, self._gone_fd)

    def close(self) -> None:
        """Idempotent; channels that are lent are closed when they come back, which is now."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._gone_fd, 1)
            self._closed = True
            for channel in self._idle:
                channel.close()
            self._idle.clear()
            self._finish()

    def _finish(self) -> None:
        if self._closed and self._lent == 0 and not self._context.closed:
            self._context.term()
            os.close(self._gone_fd)
