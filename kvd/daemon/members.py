"""kvd.sock: registration, liveness and operators. One `Member` per connection.

A connection is a session: when it closes, for whatever reason, everything the session held is freed at once.
A member that breaks the protocol is dropped, alone. What it may make us buffer is bounded.
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from kvd import wire
from kvd.errors import AlreadyRunning, PeerError, Refused, SettingsError

log = logging.getLogger("kvd.members")

Answer = Callable[["Member", wire.ToDaemon, list[int]], None]
_MAX_FDS = 4
_MAX_UNSENT = wire.MAX_REPLY_BYTES + (1 << 20)


def listen(path: Path, mode: int) -> socket.socket:
    """A listening unix socket. A dead daemon's leftover is replaced, a living daemon's never."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            pass
        except OSError as error:
            raise SettingsError(
                f"{path}: {error.strerror or error}", "remove it, or choose another run_dir"
            ) from error
        else:
            raise AlreadyRunning(f"another kvd answers at {path}", "stop it, or choose another run_dir")
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.bind(str(path))
        path.chmod(mode)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise SettingsError(f"cannot listen at {path}: {error.strerror or error}", "choose another run_dir") from error
    return sock


class Member:
    """One connection. `session` is the shell's business."""

    def __init__(self, sock: socket.socket, answer: Answer, gone: Callable[["Member"], None]) -> None:
        self._sock = sock
        self._answer = answer
        self._gone = gone
        self._inbox = bytearray()
        self._outbox = bytearray()
        self._fds: list[int] = []
        self._loop = asyncio.get_running_loop()
        self.session: object | None = None
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid, self.uid, _ = struct.unpack("3i", credentials)
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: wire.Message, fds: tuple[int, ...] = ()) -> None:
        """Queue a message; descriptors go with its first byte. A peer that does not read is dropped."""
        if self._sock.fileno() < 0:
            return
        data = wire.frame(message)
        try:
            if fds:
                assert not self._outbox, "descriptors go first"
                sent = socket.send_fds(self._sock, [data], list(fds))
            else:
                sent = self._sock.send(data) if not self._outbox else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self._outbox += data[sent:]
            if len(self._outbox) > _MAX_UNSENT:
                self.close()
            else:
                self._loop.add_writer(self._sock.fileno(), self._writable)

    def close(self) -> None:
        """Drop the peer. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._close_fds()
        self._gone(self)

    def _writable(self) -> None:
        try:
            del self._outbox[: self._sock.send(self._outbox)]
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not self._outbox:
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, _MAX_FDS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds = b"", []
        self._fds += fds
        if not data:
            self.close()
            return
        self._inbox += data
        try:
            self._read_frames()
        except PeerError as error:
            log.warning("dropped pid %d uid %d: %s", self.pid, self.uid, error)
            self.close()

    def _read_frames(self) -> None:
        if len(self._fds) > _MAX_FDS:
            raise PeerError("too many descriptors")
        while len(self._inbox) >= wire.FRAME.size and self._sock.fileno() >= 0:
            (length,) = wire.FRAME.unpack_from(self._inbox)
            if length > wire.MAX_FRAME_BYTES:
                raise PeerError(f"a frame of {length} bytes")
            end = wire.FRAME.size + length
            if len(self._inbox) < end:
                return
            message = wire.decode_to_daemon(self._inbox[wire.FRAME.size : end])
            del self._inbox[:end]
            fds, self._fds = self._fds, []
            try:
                self._answer(self, message, fds)
            except Refused as refused:
                self.send(wire.Refusal(refused.message, refused.hint))
            finally:
                for fd in fds:  # whoever wanted one has taken it out of the list
                    os.close(fd)

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


class Members:
    """Accepts connections and keeps count of them."""

    def __init__(
        self, sock: socket.socket, most: int, answer: Answer, gone: Callable[[Member], None],
        shortage: Callable[[], str],
    ) -> None:  # fmt: skip
        """`shortage`: why nobody more can be taken in now, in words."""
        self._sock = sock
        self._most = most
        self._shortage = shortage
        self._answer = answer
        self._on_gone = gone
        self._all: set[Member] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._accept)

    def __len__(self) -> int:
        return len(self._all)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return  # the peer changed its mind, or we are out of descriptors: it will try again
        sock.setblocking(False)
        full = f"max_sessions ({self._most}) are connected" if len(self._all) >= self._most else self._shortage()
        if full:
            log.warning("refused a connection: %s", full)
            sock.close()
            return
        self._all.add(Member(sock, self._answer, self._gone))

    def _gone(self, member: Member) -> None:
        self._all.discard(member)
        self._on_gone(member)

    def close(self) -> None:
        """Stop listening and drop everybody. Idempotent."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        for member in list(self._all):
            member.close()
