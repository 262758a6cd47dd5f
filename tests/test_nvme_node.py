"""A real kvd with its NVMe tier in a real process on a real file system: restarts, deaths, damage, lack of room."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvd import wire
from tests.harness import MIB, Daemon, PluginProcess, eventually, reattached, span
from tests.kvdctl import RawWorker, doctor, of


def two_tiers(folder: Path, arena_mib: int = 16, **settings: object) -> Daemon:
    defaults = {
        "nvme__path": folder / "nvme", "nvme__size_bytes": 256 * MIB, "nvme__segment_bytes": 8 * MIB,
        "nvme__write_delay_s": 0.05,
    }  # fmt: skip
    return Daemon(folder / "run", arena_mib, 4, **{**defaults, **settings})


def nvme(daemon: Daemon) -> wire.TierStatus:
    return daemon.status().tiers[1]


def ready(daemon: Daemon) -> None:
    eventually(lambda: not nvme(daemon).trouble, 20, "the NVMe tier works")


def written(daemon: Daemon, pages: int) -> None:
    eventually(lambda: nvme(daemon).pages >= pages, 20, f"{pages} pages are written")


def reboot(daemon: Daemon) -> None:
    """kvd and its memory are gone."""
    daemon.kill()
    daemon.arena_path.unlink()
    daemon.start()
    ready(daemon)


def process_of(daemon: Daemon) -> psutil.Process:
    """The tier's."""
    (child,) = psutil.Process(daemon.status().pid).children()
    return child


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with two_tiers(tmp_path) as daemon:
        ready(daemon)
        yield daemon


def test_pages_survive_the_loss_of_all_memory(daemon: Daemon, worker: PluginProcess) -> None:
    for conversation in range(4):
        worker.do("put", keys=span(60, conversation))
    written(daemon, 240)
    reboot(daemon)
    reattached(worker)
    assert daemon.status().tiers[0].pages == 0
    for conversation in range(4):
        assert worker.do("exists", keys=span(60, conversation)) == 60
        assert worker.do("take", keys=span(60, conversation)) == ["right"] * 60
    assert daemon.status().counters["pages_promoted"] == 240
    assert daemon.faults() == []


def test_a_read_without_a_lookup_fetches_too(daemon: Daemon, worker: PluginProcess) -> None:
    worker.do("put", keys=span(100))
    written(daemon, 100)
    reboot(daemon)
    reattached(worker)
    assert worker.do("take", keys=span(100)) == ["right"] * 100


def test_a_clean_stop_writes_what_is_not_written_yet(tmp_path: Path) -> None:
    with two_tiers(tmp_path, nvme__write_delay_s=600) as daemon:
        ready(daemon)
        with PluginProcess(daemon.socket) as worker:
            assert worker.do("wait")
            worker.do("put", keys=span(200))
        assert nvme(daemon).pages == 0
        process_of(daemon).terminate()  # systemd tells all processes of a unit
        daemon.signal(signal.SIGTERM)
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        daemon.start()
        ready(daemon)
        with PluginProcess(daemon.socket) as worker:
            assert worker.do("wait")
            assert worker.do("take", keys=span(200)) == ["right"] * 200


def test_more_than_fits_in_ram_is_all_there(tmp_path: Path) -> None:
    with two_tiers(tmp_path, arena_mib=8) as daemon, PluginProcess(daemon.socket) as worker:
        ready(daemon)
        assert worker.do("wait")
        for conversation in range(20):
            worker.do("put", keys=span(100, conversation))  # 1.6 MiB each, four times the arena together
            written(daemon, 100 * (conversation + 1))
        assert daemon.status().counters["ram_evicted"] > 1000
        for conversation in range(20):
            assert worker.do("exists", keys=span(100, conversation)) == 100
            assert worker.do("take", keys=span(100, conversation)) == ["right"] * 100
        assert daemon.faults() == []


def test_a_tier_that_is_full_forgets_and_stays_right(tmp_path: Path) -> None:
    with two_tiers(tmp_path, arena_mib=8, nvme__size_bytes=16 * MIB) as daemon, PluginProcess(daemon.socket) as worker:
        ready(daemon)
        assert worker.do("wait")
        for conversation in range(30):
            worker.do("put", keys=span(100, conversation))
            eventually(lambda: nvme(daemon).counters["waiting_to_be_written"] == 0, 10)
        answers = [answer for c in range(30) for answer in worker.do("take", keys=span(100, c))]
        assert "WRONG" not in answers
        assert answers.count("right") >= 400
        assert nvme(daemon).bytes_used <= 16 * MIB
        assert daemon.faults() == []


def test_the_tiers_process_dies_and_comes_back(daemon: Daemon, worker: PluginProcess) -> None:
    for conversation in range(2):
        worker.do("put", keys=span(60, conversation))
    written(daemon, 120)
    process_of(daemon).kill()
    assert worker.do("take", keys=span(60)) == ["right"] * 60, "RAM does not care"
    eventually(lambda: nvme(daemon).counters["restarts"] == 1, 5)
    ready(daemon)
    assert nvme(daemon).pages == 120
    worker.do("put", keys=span(60, 2))
    written(daemon, 180)
    reboot(daemon)
    reattached(worker)
    assert worker.do("take", keys=span(60, 2)) == ["right"] * 60


def test_it_dies_in_the_middle_of_reads_and_nothing_is_lost_or_wrong(daemon: Daemon, worker: PluginProcess) -> None:
    keys = [span(100, conversation) for conversation in range(3)]
    for chain_ in keys:
        worker.do("put", keys=chain_)
    written(daemon, 300)
    for round_ in range(4):
        reboot(daemon)
        reattached(worker)
        for chain_ in keys:
            worker.tell("take", keys=chain_)
        time.sleep(0.003 * round_)  # another moment each round
        process_of(daemon).kill()
        for _ in keys:
            assert set(worker.hear()) <= {"right", "miss"}
            assert worker.seconds < 2.5
        eventually(lambda: nvme(daemon).counters["restarts"] == 1, 5)
        ready(daemon)
        assert worker.do("take", keys=keys[0]) == ["right"] * 100
        assert daemon.faults() == []


def test_kvd_dies_in_the_middle_of_writes(tmp_path: Path) -> None:
    with two_tiers(tmp_path, nvme__write_delay_s=0) as daemon:
        for round_ in range(5):
            with PluginProcess(daemon.socket) as worker:
                assert worker.do("wait")
                for conversation in range(6):
                    worker.tell("put", keys=span(60, 10 * round_ + conversation))
                time.sleep(0.02 + 0.03 * round_)  # another moment each round
                daemon.kill()
                for _ in range(6):
                    worker.hear()
            daemon.arena_path.unlink()
            daemon.start()
            ready(daemon)
            with PluginProcess(daemon.socket) as reader:
                assert reader.do("wait")
                for conversation in range(6):
                    keys = span(60, 10 * round_ + conversation)
                    held = reader.do("exists", keys=keys)
                    answers = reader.do("take", keys=keys)
                    assert set(answers) <= {"right", "miss"}
                    assert answers[:held] == ["right"] * held
            assert daemon.faults() == []


def test_a_stopped_tier_costs_a_deadline_at_most(daemon: Daemon, worker: PluginProcess) -> None:
    worker.do("put", keys=span(60))
    written(daemon, 60)
    reboot(daemon)
    reattached(worker)
    process_of(daemon).send_signal(signal.SIGSTOP)
    assert worker.do("exists", keys=span(60)) == 60, "it is not known yet"
    assert worker.seconds < 0.2
    assert worker.do("take", keys=span(60)) == ["miss"] * 60
    assert worker.seconds < 1.5
    assert worker.do("circuit") == "closed", "kvd itself answered in time"
    worker.do("put", keys=span(60, 1))
    assert worker.do("take", keys=span(60, 1)) == ["right"] * 60
    process_of(daemon).send_signal(signal.SIGCONT)
    eventually(lambda: worker.do("take", keys=span(60)) == ["right"] * 60, 5)


@pytest.mark.slow
def test_a_tier_that_hangs_is_killed_and_started_again(daemon: Daemon, worker: PluginProcess) -> None:
    worker.do("put", keys=span(60))
    written(daemon, 60)
    reboot(daemon)
    reattached(worker)
    process_of(daemon).send_signal(signal.SIGSTOP)
    assert worker.do("exists", keys=span(60)) == 60
    eventually(lambda: "silent" in nvme(daemon).trouble, 15)
    ready(daemon)
    assert worker.do("take", keys=span(60)) == ["right"] * 60
    assert daemon.faults() == []


def test_bits_that_flipped_on_disk_are_misses(daemon: Daemon, worker: PluginProcess, tmp_path: Path) -> None:
    keys = span(60)
    worker.do("put", keys=keys)
    written(daemon, 60)
    daemon.kill()
    daemon.arena_path.unlink()
    eventually(lambda: not _open_files(tmp_path / "nvme"), 5, "the tier's process has ended")
    (segment,) = (tmp_path / "nvme").glob("segment-*")
    with segment.open("r+b") as file:
        for page in (3, 40):
            file.seek(4096 + 16384 * page + 77)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 4]))
    daemon.start()
    ready(daemon)
    reattached(worker)
    worker.do("exists", keys=keys)
    answers = worker.do("take", keys=keys)
    assert set(answers) <= {"right", "miss"}
    eventually(lambda: worker.do("exists", keys=keys) < 60, 5, "what is damaged is known to be absent")
    eventually(lambda: of(doctor(daemon)[1], "nvme")[0]["level"] == "yellow", 10, "the doctor says so")
    assert "damaged pages" in of(doctor(daemon)[1], "nvme")[0]["message"]
    worker.do("put", keys=keys)
    assert worker.do("take", keys=keys) == ["right"] * 60
    assert daemon.faults() == []


def _open_files(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            found += [f.path for f in process.open_files() if f.path.startswith(str(folder))]
        except psutil.Error:
            continue
    return found


def test_a_folder_that_cannot_be_used_leaves_ram_and_a_red_line(tmp_path: Path) -> None:
    (tmp_path / "nvme").write_text("a file, not a folder")
    with two_tiers(tmp_path) as daemon, PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(20))
        assert worker.do("take", keys=span(20)) == ["right"] * 20
        eventually(lambda: nvme(daemon).trouble not in ("opening", "not started yet"), 10)
        status, findings = doctor(daemon)
        (red,) = of(findings, "nvme")
        assert (status, red["level"]) == (1, "red")
        assert str(tmp_path / "nvme") in red["message"]


def test_a_disk_that_is_not_mounted_is_said_and_nothing_is_written_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    where = {"nvme__path": tmp_path / "disk" / "kvd", "nvme__mount_point": tmp_path / "disk"}
    with two_tiers(tmp_path, **where) as daemon, PluginProcess(daemon.socket) as worker:
        assert worker.do("wait")
        worker.do("put", keys=span(20))
        assert worker.do("take", keys=span(20)) == ["right"] * 20
        eventually(lambda: nvme(daemon).trouble not in ("opening", "not started yet"), 10)
        (red,) = of(doctor(daemon)[1], "nvme")
        assert (red["level"], "nothing is mounted" in red["message"]) == ("red", True)
        assert "mount the disk" in red["remedy"]
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_tier_below_its_mount_point_works(tmp_path: Path) -> None:
    with two_tiers(tmp_path, nvme__mount_point="/") as daemon:
        ready(daemon)


def test_the_doctor_is_green_about_a_tier_that_works(daemon: Daemon, worker: PluginProcess) -> None:
    worker.do("put", keys=span(20))
    written(daemon, 20)
    status, findings = doctor(daemon)
    (green,) = of(findings, "nvme")
    assert (status, green["level"]) == (0, "green")
    assert "20 pages" in green["message"]


def test_more_reads_of_one_page_from_below_than_a_session_may_hold_end_the_session(daemon: Daemon) -> None:
    with RawWorker(daemon) as before:
        (key,) = before.put(1)
        written(daemon, 1)
    reboot(daemon)
    with RawWorker(daemon) as greedy:
        tier = process_of(daemon)
        tier.suspend()
        try:
            with contextlib.ExitStack() as lent:
                for _ in range(12):
                    channel = lent.enter_context(greedy.channels.lend())
                    for number in range(50):
                        channel.tell(wire.LeasePages(number, 0, key, 30.0, 8.0))
                time.sleep(0.1)  # all of them wait
                tier.resume()
                eventually(lambda: not daemon.status().workers, 10, "the greedy session is gone")
        finally:
            tier.resume()
    assert daemon.faults() == []
    with RawWorker(daemon) as honest:
        assert honest.found([key]) == 1
