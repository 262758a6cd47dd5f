"""What happens when something dies, stops, fills up or lies: real processes, real signals.

A worker always gets an answer within its deadline, wrong bytes never come back, and nothing leaks.
"""

import os
import resource
import signal
import socket
import time
from pathlib import Path

import pytest

from kvd import wire
from kvd.client import Link
from kvd.errors import PeerError, Unavailable
from kvd.leasetable import LeaseTable, LeaseTableReader
from tests.harness import Daemon, PluginProcess, eventually, reattached, span

DEADLINE_S = 2.0 + 0.5  # a call's own, and the noise of a busy machine


# -- kvd dies ----------------------------------------------------------------------------------------------------


def test_after_kill_9_the_ram_tier_is_warm_and_workers_attach_by_themselves(
    daemon: Daemon, worker: PluginProcess
) -> None:
    keys = span(60)
    worker.do("put", keys=keys)
    daemon.kill()
    assert worker.do("take", keys=keys) == ["miss"] * 60
    assert worker.seconds < 0.5, "a dead daemon is a miss at once"
    assert worker.do("exists", keys=keys) == 0
    daemon.start()
    reattached(worker)
    assert daemon.status().warm_pages == 60
    assert worker.do("exists", keys=keys) == 60
    assert worker.do("take", keys=keys) == ["right"] * 60
    assert daemon.faults() == []


def test_a_call_that_is_waiting_hears_of_kvds_death_at_once(daemon: Daemon, worker: PluginProcess) -> None:
    keys = span(60)
    worker.do("put", keys=keys)
    daemon.signal(signal.SIGSTOP)
    worker.tell("take", keys=keys)
    time.sleep(0.3)  # long enough to be waiting for the answer, far from its deadline
    daemon.kill()
    assert worker.hear() == ["miss"] * 60
    assert 0.2 < worker.seconds < 1.0, "it waited, and not until its deadline"


def test_kill_9_in_the_middle_of_writes_leaves_whole_pages_only(daemon: Daemon) -> None:
    for round_ in range(6):
        with PluginProcess(daemon.socket) as worker:
            assert worker.do("wait")
            for conversation in range(8):
                worker.tell("put", keys=span(100, 10 * round_ + conversation))
            time.sleep(0.004 * round_)  # the only way to hit another moment each round
            daemon.kill()
            for _ in range(8):
                worker.hear()
        daemon.start()
        assert daemon.faults() == []
        with PluginProcess(daemon.socket) as reader:
            assert reader.do("wait")
            for conversation in range(8):
                keys = span(100, 10 * round_ + conversation)
                held = reader.do("exists", keys=keys)
                answers = reader.do("take", keys=keys)
                assert "WRONG" not in answers
                assert answers[:held] == ["right"] * held


def test_a_clean_stop_leaves_nothing_and_starts_cold(daemon: Daemon, worker: PluginProcess) -> None:
    worker.do("put", keys=span(3))
    daemon.stop()
    daemon.start()
    reattached(worker)
    assert worker.do("take", keys=span(3)) == ["miss"] * 3


def test_a_kept_arena_survives_a_clean_stop(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "run", arena__keep_on_stop="true").start()
    with PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(9))
        daemon.signal(signal.SIGTERM)
        assert daemon.process is not None
        assert daemon.process.wait(10) == 0
        daemon.start()
        reattached(worker)
        assert worker.do("take", keys=span(9)) == ["right"] * 9
    daemon.kill()
    daemon.stop()


def test_an_arena_of_another_size_or_format_is_started_cold_and_said(daemon: Daemon, worker: PluginProcess) -> None:
    worker.do("put", keys=span(3))
    daemon.kill()
    with daemon.arena_path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x63")
    daemon.start()
    assert "starting cold: arena format 99" in daemon.log.read_text()
    daemon.kill()
    daemon.env["KVD_ARENA__SIZE_BYTES"] = str(32 << 20)
    daemon.start()
    assert daemon.status().warm_pages == 0
    assert daemon.faults() == []


def test_a_second_kvd_on_the_same_folder_is_refused(daemon: Daemon) -> None:
    other = Daemon(daemon.folder).start(wait=False)
    assert other.process is not None
    assert other.process.wait(10) == 1
    assert "another kvd" in daemon.log.read_text()
    assert daemon.status().pid


# -- kvd stops answering -----------------------------------------------------------------------------------------


def test_a_stopped_daemon_costs_one_deadline_and_not_one_per_call(daemon: Daemon, worker: PluginProcess) -> None:
    keys = span(20)
    worker.do("put", keys=keys)
    daemon.signal(signal.SIGSTOP)
    assert worker.do("take", keys=keys) == ["miss"] * 20
    assert worker.seconds < DEADLINE_S
    for _ in range(20):
        worker.do("exists", keys=keys)
        assert worker.seconds < 0.1
        worker.do("take", keys=keys)
        assert worker.seconds < 0.1
        worker.do("put", keys=span(20, 5))
        assert worker.seconds < 0.1
    assert worker.do("circuit").startswith("open")
    daemon.signal(signal.SIGCONT)
    reattached(worker)
    assert worker.do("take", keys=keys) == ["right"] * 20


def test_an_idle_worker_notices_a_stopped_daemon_before_it_asks(daemon: Daemon, worker: PluginProcess) -> None:
    daemon.signal(signal.SIGSTOP)
    eventually(lambda: worker.do("circuit").startswith("open"), 5)
    worker.do("take", keys=span(5))
    assert worker.seconds < 0.1
    daemon.signal(signal.SIGCONT)
    reattached(worker)


def test_closing_is_quick_whatever_kvd_does(daemon: Daemon, worker: PluginProcess) -> None:
    daemon.signal(signal.SIGSTOP)
    assert worker.do("close")
    assert worker.seconds < 1.0
    daemon.signal(signal.SIGCONT)


def test_a_replaced_socket_is_found(daemon: Daemon, worker: PluginProcess) -> None:
    keys = span(5)
    worker.do("put", keys=keys)
    daemon.socket.unlink()
    daemon.kill()
    daemon.start()
    reattached(worker)
    assert worker.do("take", keys=keys) == ["right"] * 5


def test_a_full_arena_drops_writes_and_keeps_serving(tmp_path: Path) -> None:
    with Daemon(tmp_path / "run", arena_mib=4) as daemon, PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        for conversation in range(12):
            assert all(worker.do("put", keys=span(100, conversation)))
        assert daemon.status().tiers[0].evicted > 0
        last = worker.do("take", keys=span(100, 11))
        assert "WRONG" not in last
        assert last[0] == "right"
        assert daemon.faults() == []


# -- workers die -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do", ["put", "take"])
def test_a_worker_killed_in_the_middle_gives_everything_back(daemon: Daemon, worker: PluginProcess, do: str) -> None:
    keys = span(40)
    worker.do("put", keys=keys)
    with PluginProcess(daemon.socket) as victim:
        assert victim.do("wait")
        victim.do("exists", keys=keys)
        victim.do("hang_in_copy")
        victim.tell(do, keys=span(40, 1) if do == "put" else keys)

        def busy() -> bool:
            return any(w.reservations + w.leases > 1 for w in daemon.status().workers if w.pid == victim.process.pid)

        eventually(busy if do == "take" else lambda: any(w.reservations for w in daemon.status().workers), 5)
        victim.kill()
        started = time.monotonic()
        eventually(lambda: len(daemon.status().workers) == 1, 5)
        assert time.monotonic() - started < 0.1 + 0.4, "within 100 ms, and the noise of a busy machine"
    assert worker.do("exists", keys=span(40, 1)) == 0
    assert sum(w.reservations for w in daemon.status().workers) == 0
    assert daemon.faults() == []
    assert daemon.status().tiers[0].pages == 40


def test_two_workers_share_and_other_weights_do_not(daemon: Daemon, worker: PluginProcess) -> None:
    keys = span(10)
    worker.do("put", keys=keys)
    with PluginProcess(daemon.socket) as same, PluginProcess(daemon.socket, "another revision") as other:
        assert same.do("wait")
        assert other.do("wait")
        assert same.do("take", keys=keys) == ["right"] * 10
        assert other.do("take", keys=keys) == ["miss"] * 10


# -- memory goes bad ---------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_a_miss_a_counter_and_a_quarantine(daemon: Daemon, worker: PluginProcess) -> None:
    keys = span(6)
    worker.do("put", keys=keys)
    raw = daemon.arena_path.read_bytes()
    from tests.plugin_process import page_bytes

    at = raw.index(page_bytes(keys[3], 0, 16)[:16])
    with daemon.arena_path.open("r+b") as file:
        file.seek(at + 5)
        file.write(bytes([raw[at + 5] ^ 1]))
    assert worker.do("take", keys=keys) == ["right"] * 3 + ["miss"] + ["right"] * 2
    assert daemon.status().counters["corrupt_payload"] == 1
    assert worker.do("exists", keys=keys) == 3
    worker.do("put", keys=keys)
    assert worker.do("take", keys=keys) == ["right"] * 6
    assert daemon.faults() == []


# -- strangers ---------------------------------------------------------------------------------------------------


def test_a_worker_of_another_protocol_is_told_so(daemon: Daemon) -> None:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(str(daemon.socket))
    peer.sendall(wire.frame(wire.Hello(99, "tool", "future")))
    reply = wire.decode_from_daemon(peer.recv(4096)[4:])
    peer.close()
    assert isinstance(reply, wire.Refusal)
    assert "protocol" in reply.reason
    assert "same kvd version" in reply.hint


def test_a_lease_table_that_could_kill_kvd_is_refused(daemon: Daemon) -> None:
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, 16384)
    with pytest.raises((Unavailable, PeerError)):
        Link(daemon.socket, "worker", "x", unsealed, 2.0)
    os.close(unsealed)
    assert daemon.status().pid


def test_more_connections_than_allowed_are_refused_and_the_rest_served(tmp_path: Path) -> None:
    with Daemon(tmp_path / "run", max_sessions=4) as daemon:
        links = [daemon.tool() for _ in range(4)]
        with pytest.raises(Unavailable):
            daemon.tool()
        for link in links:
            link.close()
        eventually(lambda: _reaches(daemon), 5)


def _reaches(daemon: Daemon) -> bool:
    try:
        return bool(daemon.status().pid)
    except Unavailable:
        return False


def test_a_lease_table_that_is_full_falls_back_to_asking(daemon: Daemon) -> None:
    table = LeaseTable()
    now = time.monotonic()
    assert table.hold(tuple(range(1, 1025)), now, 10.0) is not None
    assert table.hold((5000,), now, 10.0) is None
    assert table.hold((5000,), now + 11, 10.0) is not None
    table.close()


def test_what_ran_out_is_let_go_without_letting_go_of_its_successor() -> None:
    """A row whose promise ran out is given out again; who had it before may still drop it."""
    table = LeaseTable()
    reader = LeaseTableReader(os.dup(table.fd))
    old = table.hold(tuple(range(1, 1025)), 0.0, 10.0)
    new = table.hold((5000, 5001), 11.0, 10.0)
    assert old is not None
    assert new is not None
    table.drop(old)
    assert reader.live(12.0) == {5000, 5001}
    table.drop(new)
    assert reader.live(12.0) == set()
    reader.close()
    table.close()


# -- nothing is left ---------------------------------------------------------------------------------------------


def test_a_worker_without_descriptors_attaches_once_it_has_some(daemon: Daemon, worker: PluginProcess) -> None:
    daemon.kill()
    pid = worker.process.pid
    had = resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    daemon.start()
    time.sleep(1.5)  # of attaching in vain: nothing tells that it does
    resource.prlimit(pid, resource.RLIMIT_NOFILE, had)
    reattached(worker)
    keys = span(4)
    assert worker.do("put", keys=keys) == [True] * 4
    assert worker.do("take", keys=keys) == ["right"] * 4


@pytest.mark.parametrize("spare", [0, 1, 3, 5])
def test_a_worker_that_runs_out_of_descriptors_misses_and_lives(worker: PluginProcess, spare: int) -> None:
    """The first message needs a socket of ZeroMQ's, which ends the process where it gets no descriptors for it."""
    pid, keys = worker.process.pid, span(4)
    most = max(int(fd) for fd in os.listdir(f"/proc/{pid}/fd")) + 1 + spare
    had = resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert worker.do("put", keys=keys) == [False] * 4
    resource.prlimit(pid, resource.RLIMIT_NOFILE, had)
    reattached(worker)
    assert worker.do("put", keys=keys) == [True] * 4
    assert worker.do("take", keys=keys) == ["right"] * 4
