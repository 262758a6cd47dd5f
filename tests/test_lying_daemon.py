"""A daemon that answers with garbage: whatever it says, its workers miss in time and live on."""

import mmap
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

from kvd import wire
from kvd.index import IndexWriter, index_bytes
from tests.harness import PluginProcess, eventually, span

DEADLINE_S = 2.0 + 0.5  # a call's own, and the noise of a busy machine


class Liar:
    """Answers like kvd on kvd.sock, and with garbage on kvd.data. Stands in for a broken daemon."""

    def __init__(self, folder: Path, garbage: bytes = b"", stays: bool = True) -> None:
        """`stays`: on the line, once a worker has joined."""
        folder.mkdir(parents=True)
        self._stays = stays
        self.joined_at: list[float] = []
        self.path, self._garbage = folder / "kvd.sock", garbage
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(f"ipc://{folder / 'kvd.data'}")
        self._folder = folder
        self._stopping = False
        self._threads = [threading.Thread(target=self._members), threading.Thread(target=self._data)]
        for thread in self._threads:
            thread.start()

    def _members(self) -> None:
        arena, index = os.memfd_create("a"), os.memfd_create("i")
        os.ftruncate(arena, 1 << 20)
        os.ftruncate(index, index_bytes(1024))
        area = mmap.mmap(index, index_bytes(1024))
        IndexWriter(memoryview(area), 1024, 1)
        while not self._stopping:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                break
            with peer, suppress(ConnectionError):  # the worker may end with something of ours unread
                _, fds, _, _ = socket.recv_fds(peer, 65536, 4)
                for fd in fds:
                    os.close(fd)
                welcome = wire.Welcome(
                    1, 1, 1, b"t" * 16, f"ipc://{self._folder / 'kvd.data'}", 1 << 20, index_bytes(1024), "liar"
                )
                socket.send_fds(peer, [wire.frame(welcome)], [arena, index])
                while data := peer.recv(65536):
                    (length,) = wire.FRAME.unpack_from(data)
                    message = wire.decode_to_daemon(data[4 : 4 + length])
                    if isinstance(message, wire.Join):
                        self.joined_at.append(time.monotonic())
                        if not self._stays:
                            break
                        peer.sendall(wire.frame(wire.Joined(list(range(len(message.namespaces))))))
                    elif isinstance(message, wire.Ping):
                        peer.sendall(wire.frame(wire.Pong(message.n)))
        os.close(arena)
        os.close(index)

    def _data(self) -> None:
        while not self._stopping:
            if self._router.poll(50):
                identity, *_ = self._router.recv_multipart()
                self._router.send_multipart([identity, self._garbage])
        self._router.close()
        self._context.term()

    def close(self) -> None:
        self._stopping = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff" * 40,
        wire.encode(wire.Found(1, 3)),
        wire.encode(wire.Leased(1, 7, b"short")),
        wire.encode(wire.Leased(1, 7, wire.LEASED_ROW.pack(1 << 60, 1, 1 << 30, bytes(16)) * 5)),
        wire.encode(wire.Leased(1, 7, wire.LEASED_ROW.pack(1 << 19, 1, 8192, bytes(16)) * 5)),
        wire.encode(wire.Reserved(1, 7, wire.RESERVED_ROW.pack(1 << 60, 1, 0) * 5)),
        wire.encode(wire.Refusal("no", "try", 1)),
    ],
    ids=["empty", "noise", "other kind", "short rows", "wild place", "wrong bytes", "wild write", "refusal"],
)
def test_a_lying_daemon_is_a_miss(tmp_path: Path, garbage: bytes) -> None:
    liar = Liar(tmp_path / "run", garbage)
    try:
        with PluginProcess(liar.path) as worker:
            assert worker.do("wait")
            for do in ("take", "put", "exists"):
                answer = worker.do(do, keys=span(5))
                assert worker.seconds < DEADLINE_S
                assert answer in (["miss"] * 5, [False] * 5, [True] * 5, 0)
            assert worker.process.poll() is None
    finally:
        liar.close()


def test_a_daemon_that_hangs_up_at_once_is_asked_ever_more_slowly(tmp_path: Path) -> None:
    liar = Liar(tmp_path / "run", stays=False)
    try:
        with PluginProcess(liar.path) as worker:
            eventually(lambda: len(liar.joined_at) >= 6, 20)
            assert liar.joined_at[5] - liar.joined_at[0] > 1.0
            assert worker.do("exists", keys=span(5)) == 0
    finally:
        liar.close()
