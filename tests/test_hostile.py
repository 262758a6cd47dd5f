"""Peers that lie and memory that rots: the peer is dropped, honest workers do not notice, wrong bytes never come out.

The default suite runs a sample; `-m slow` runs 100,000 frames, 10,000 mutations and five minutes of mixed load.
"""

import contextlib
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvd import wire
from kvd.client import Channel, Link
from kvd.errors import Unavailable
from kvd.leasetable import LeaseTable
from kvd.pages import chain
from tests.harness import MIB, Daemon, PluginProcess, eventually
from tests.test_wire import SAMPLES

WILD = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**63]),
    st.floats(),
    st.binary(max_size=100),
    st.text(max_size=20),
    st.none(),
    st.lists(st.integers(-(2**63), 2**64 - 1), max_size=3),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A real message, with one field replaced, or some bytes changed or cut off."""
    raw = wire.encode(draw(st.sampled_from(SAMPLES)))
    kind = draw(st.integers(0, 2))
    if kind == 0:
        fields = msgspec.msgpack.decode(raw)
        fields[draw(st.sampled_from(sorted(fields)))] = draw(WILD)
        return msgspec.msgpack.encode(fields)
    if kind == 1:
        changed = bytearray(raw)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    return raw[: draw(st.integers(0, len(raw)))]


BODY = st.one_of(st.binary(max_size=64), mutated())
FRAME = st.one_of(
    BODY.map(lambda body: wire.FRAME.pack(len(body)) + body),
    st.binary(max_size=64),
    st.tuples(st.integers(0, 2**32 - 1), BODY).map(lambda lie: wire.FRAME.pack(lie[0]) + lie[1]),
)


def span(pages: int, conversation: int = 0) -> list[str]:
    return [key.hex() for key in chain([conversation, *range(4 * pages - 1)], 4)]


@pytest.fixture
def honest(daemon: Daemon) -> Iterator[PluginProcess]:
    with PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(30))
        yield worker


class Stranger:
    """Says Hello as a worker, then whatever it is told, on either socket; comes back when it is dropped."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._table = LeaseTable()
        self._context = zmq.Context()
        self._link: Link | None = None
        self._channel: Channel | None = None
        self._frames = 0

    def _connect(self) -> Link:
        for _ in range(200):
            with contextlib.suppress(Unavailable):
                return Link(self._daemon.socket, "worker", "stranger", self._table.fd, 5.0)
            time.sleep(0.01)  # all sessions are taken until the daemon has seen our last ones close
        raise AssertionError("kvd lets nobody in")

    def say(self, frame: bytes) -> None:
        """A frame on kvd.sock, after a proper Hello every other time."""
        self._frames += 1
        try:
            if self._frames % 2:
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.connect(str(self._daemon.socket))
                    peer.sendall(frame)
            else:
                self._link = self._link or self._connect()
                self._link.sock.sendall(frame)
        except OSError:
            self.hang_up()

    def shout(self, body: bytes) -> None:
        """A frame on kvd.data, with a valid ticket until that costs us the session."""
        if self._channel is None or self._frames % 50 == 0:
            self.hang_up()
            self._link = self._connect()
            welcome = self._link.welcome
            self._channel = Channel(
                self._context, welcome.data_endpoint, welcome.ticket + struct.pack("<I", 1), self._link.sock.fileno()
            )
        self._frames += 1
        with contextlib.suppress(zmq.ZMQError):
            self._channel._socket.send(body, zmq.NOBLOCK)

    def hang_up(self) -> None:
        for held in (self._channel, self._link):
            if held is not None:
                held.close()
        self._channel = self._link = None

    def close(self) -> None:
        self.hang_up()
        self._table.close()
        self._context.term()


def _bombard(daemon: Daemon, honest: PluginProcess, examples: int, frames: int) -> None:
    process = psutil.Process(daemon.status().pid)
    before = process.memory_info().rss
    fds = process.num_fds()
    sent = 0
    stranger = Stranger(daemon)

    @settings(
        max_examples=examples, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip
    @given(st.lists(FRAME, min_size=frames, max_size=frames), st.lists(BODY, min_size=frames, max_size=frames))
    def bombard(said: list[bytes], shouted: list[bytes]) -> None:
        nonlocal sent
        for frame in said:
            stranger.say(frame)
        for body in shouted:
            stranger.shout(body)
        sent += len(said) + len(shouted)

    try:
        bombard()
    finally:
        stranger.close()
    assert sent >= 2 * frames * examples
    assert honest.do("take", keys=span(30)) == ["right"] * 30
    assert honest.do("circuit") == "closed"
    assert daemon.faults() == []
    eventually(lambda: len(daemon.status().workers) == 1, 10)
    assert process.memory_info().rss - before < 64 * MIB
    assert process.num_fds() - fds < 16


def test_hostile_frames_cost_their_sender_only(daemon: Daemon, honest: PluginProcess) -> None:
    _bombard(daemon, honest, 10, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_hostile_frames(daemon: Daemon, honest: PluginProcess) -> None:
    _bombard(daemon, honest, 1000, 51)


def test_raw_bytes_at_the_zeromq_port_reserve_no_memory(daemon: Daemon, honest: PluginProcess) -> None:
    """An 8 GiB length prefix, silence in mid-handshake, and plain noise."""
    process = psutil.Process(daemon.status().pid)
    before = process.memory_info().vms
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    peers = []
    for body in (greeting + ready + b"\x02" + struct.pack(">Q", 8 << 30), greeting, b"", random.randbytes(4096)):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(str(daemon.folder / "kvd.data"))
        peer.sendall(body)
        peers.append(peer)
    assert honest.do("take", keys=span(30)) == ["right"] * 30
    assert process.memory_info().vms - before < 1 << 30
    for peer in peers:
        peer.close()
    assert daemon.faults() == []


# -- rot ---------------------------------------------------------------------------------------------------------


def _rot(folder: Path, rounds: int, spots: int) -> None:
    rng = random.Random(rounds)
    rotten = 0
    with Daemon(folder, arena_mib=4, extent_mib=1) as daemon, PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        for round_ in range(rounds):
            conversation = round_ % 5
            worker.do("put", keys=span(60, conversation))
            size = daemon.arena_path.stat().st_size
            with daemon.arena_path.open("r+b") as file:
                for spot in range(spots):
                    # Every other one in the headers, which are a small part of the memory.
                    extent = rng.randrange(4) * MIB + 4096
                    at = extent + rng.randrange(64, 12_000) if spot % 2 else rng.randrange(4096, size)
                    file.seek(at)
                    file.write(rng.randbytes(rng.choice([1, 1, 4, 64])))
                    rotten += 1
            answers = worker.do("take", keys=span(60, rng.randrange(5)))
            assert "WRONG" not in answers
            if round_ % 20 == 19:
                daemon.kill()
                daemon.start()
                assert worker.do("wait")
        assert rotten == rounds * spots
        assert worker.do("stats")["miss_corrupt"] > 0


def test_rotten_memory_is_never_served(tmp_path: Path) -> None:
    _rot(tmp_path / "run", 25, 20)


@pytest.mark.slow
def test_ten_thousand_mutations_are_never_served(tmp_path: Path) -> None:
    _rot(tmp_path / "run", 200, 50)


# -- soak --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_minutes_of_mixed_load_leave_memory_and_descriptors_flat(tmp_path: Path) -> None:
    """Two workers that come and go, a full arena, kvd killed once a minute."""
    rng = random.Random(5)
    readings: list[tuple[int, int, int]] = []
    with Daemon(tmp_path / "run", arena_mib=16) as daemon:
        workers = [PluginProcess(daemon.socket) for _ in range(2)]
        try:
            for worker in workers:
                assert worker.do("wait")
            began = time.monotonic()
            minute = 0
            while time.monotonic() - began < 300:
                for worker in workers:
                    pages = rng.randrange(1, 120)
                    worker.do("put", keys=span(pages, rng.randrange(40)))
                    worker.do("exists", keys=span(pages, rng.randrange(40)))
                    assert "WRONG" not in worker.do("take", keys=span(pages, rng.randrange(40)))
                if time.monotonic() - began > 60 * (minute + 1):
                    minute += 1
                    process = psutil.Process(daemon.status().pid)
                    shm = sum(p.stat().st_blocks for p in Path("/dev/shm").glob(daemon.arena_path.name))
                    own = [psutil.Process(w.process.pid) for w in workers]
                    readings.append(
                        (
                            process.memory_info().rss - process.memory_info().shared
                            + sum(p.memory_info().rss - p.memory_info().shared for p in own),
                            process.num_fds() + sum(p.num_fds() for p in own),
                            shm,
                        )
                    )  # fmt: skip
                    daemon.kill()
                    daemon.start()
                    workers[0].kill()
                    workers[0].stop()
                    workers[0] = PluginProcess(daemon.socket)
                    for worker in workers:
                        assert worker.do("wait")
            assert daemon.faults() == []
        finally:
            for worker in workers:
                worker.stop()
    rss, fds, shm = zip(*readings[1:], strict=True)
    assert len(rss) >= 3
    assert max(rss) - min(rss) < 48 * MIB, readings
    assert max(fds) - min(fds) <= 8, readings
    assert len(set(shm)) == 1, readings
