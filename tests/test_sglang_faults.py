"""A real SGLang worker while kvd is absent, killed, stopped or replaced, and kvd while its worker is killed.

One worker lives through the module; each test has a kvd of its own on the same folder. Every request is answered,
and right. How long one may take, as asserted here: three times the slowest of the same requests with kvd well (the
noise of a busy machine), and one storage deadline, after which the circuit is open and a call costs nothing.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.harness import Daemon, eventually
from tests.sglang_node import (
    PAGE_TOKENS,
    TREE,
    Answers,
    Crowd,
    ask,
    daemon_in,
    fill,
    needs_sglang,
    pages_held,
    plugin_ready,
    reference_answers,
    reusable,
    salt,
    worker,
    wrong,
)
from tools.demo.node import extra_config
from tools.sglang_cpu.endpoint import RequestRefused
from tools.sglang_cpu.server import SglangServer

pytestmark = [needs_sglang, pytest.mark.timeout(600)]

STORAGE_DEADLINE_S = 2.0  # the plugin's get_timeout_s: the longest one storage call may take
NOISE = 3.0
PROMPTS = TREE[2:6]
BACKEND = "/hicache/storage-backend"


@pytest.fixture(scope="module")
def reference() -> Answers:
    return reference_answers()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where kvd is looked for, whichever process that is at the time."""
    with tempfile.TemporaryDirectory(prefix="kvd-test-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def lasting(folder: Path, reference: Answers) -> Iterator[SglangServer]:
    """A worker that was started while there was no kvd."""
    with worker("faults", folder / "kvd.sock") as running:
        yield running


@pytest.fixture
def server(lasting: SglangServer) -> Iterator[SglangServer]:
    """The lasting worker; one that a test started anew ends with that test."""
    anew = not lasting.running
    if anew:
        lasting.start()
        lasting.wait_ready()
    pid = lasting.pid
    yield lasting
    if anew or (lasting.running and lasting.pid != pid):
        lasting.stop()


@pytest.fixture
def kvd(folder: Path, server: SglangServer) -> Iterator[Daemon]:
    """A kvd that the worker is attached to."""
    with daemon_in(folder) as daemon:
        plugin_ready(daemon)
        yield daemon


def serves(server: SglangServer, reference: Answers) -> None:
    """Fresh pages go to kvd and come back from it."""
    mine = salt()
    assert not wrong(fill(server, PROMPTS[:2], cache_salt=mine), reference)
    comes_back(server, reference, mine, PROMPTS[:2])


def comes_back(server: SglangServer, reference: Answers, mine: str, prompts: list[tuple[int, ...]]) -> None:
    """What was asked with this salt is in kvd, all of it, and right."""
    server.flush_cache()
    for prompt in prompts:
        answer = ask(server, prompt, cache_salt=mine)
        assert answer.output_ids == reference[prompt]
        assert answer.cached.total == reusable(prompt, PAGE_TOKENS)
    assert ask(server, prompts[0], cache_salt=mine).cached.device, "and the worker's own cache has it now"


def comes_back_soon(server: SglangServer, reference: Answers, mine: str, prompts: list[tuple[int, ...]]) -> None:
    """The plugin notices by itself that kvd answers again; then all is as before."""

    def hit() -> int:
        server.flush_cache()
        return ask(server, prompts[0], cache_salt=mine).cached.storage

    eventually(hit, 20, "a page comes from kvd")
    comes_back(server, reference, mine, prompts)


def slowest_when_well(server: SglangServer, reference: Answers) -> float:
    """Seconds the slowest of the prompts takes, cold, asked at once."""
    answers = Crowd(server, salt()).ask(*([prompt] for prompt in PROMPTS)).join()
    assert not wrong(answers, reference)
    return max(answer.total_s for _, answer in answers)


def agrees(server: SglangServer, method: str, path: str, body: object = None) -> bool:
    """SGLang refuses to flush and to change storage while anything is pending."""
    with suppress(RequestRefused):
        server.request(method, path, body)
        return True
    return False


# -- kvd is not there --------------------------------------------------------------------------------------------


def test_a_worker_started_without_kvd_answers_and_attaches_when_it_comes(
    server: SglangServer, folder: Path, reference: Answers
) -> None:
    assert not (folder / "kvd.sock").exists()
    mine = salt()
    without = fill(server, PROMPTS[:2], cache_salt=mine)
    assert not wrong(without, reference)
    again = ask(server, PROMPTS[0], cache_salt=mine)
    assert again.cached.total == 0, "nothing was kept anywhere"
    with daemon_in(folder) as kvd:
        plugin_ready(kvd)
        serves(server, reference)
        assert kvd.faults() == []


def test_kvd_killed_under_requests_costs_nothing_but_hits_and_comes_back_warm(
    kvd: Daemon, server: SglangServer, reference: Answers
) -> None:
    usual = slowest_when_well(server, reference)
    mine = salt()
    fill(server, PROMPTS, cache_salt=mine)
    held = pages_held(kvd)
    crowd = Crowd(server, mine).ask(*([prompt, prompt] for prompt in PROMPTS))
    eventually(lambda: crowd.answers, 60, "the first answer")
    kvd.kill()
    crowd.ask(*([prompt] for prompt in PROMPTS))
    answers = crowd.join()
    assert len(answers) == 12
    assert not wrong(answers, reference)
    assert max(answer.total_s for _, answer in answers) < NOISE * usual + STORAGE_DEADLINE_S
    server.flush_cache()
    assert ask(server, PROMPTS[0], cache_salt=mine).cached.total == 0
    kvd.start()
    plugin_ready(kvd)
    assert kvd.status().warm_pages >= held
    comes_back(server, reference, mine, PROMPTS)
    serves(server, reference)
    assert kvd.faults() == []


def test_a_replaced_socket_is_found(kvd: Daemon, server: SglangServer, reference: Answers) -> None:
    mine = salt()
    fill(server, PROMPTS[:2], cache_salt=mine)
    kvd.socket.unlink()
    kvd.kill()
    kvd.start()
    plugin_ready(kvd)
    comes_back(server, reference, mine, PROMPTS[:2])


# -- kvd does not answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_s", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_stopped_kvd_delays_no_request_beyond_one_deadline(
    kvd: Daemon, server: SglangServer, reference: Answers, stopped_s: float
) -> None:
    usual = slowest_when_well(server, reference)
    mine = salt()
    fill(server, PROMPTS, cache_salt=mine)
    crowd = Crowd(server, mine).ask(*([prompt] for prompt in PROMPTS))
    eventually(lambda: crowd.answers, 60, "the first answer from kvd")
    kvd.signal(signal.SIGSTOP)
    stopped = time.monotonic()
    fresh = Crowd(server, salt()).ask(*([prompt] for prompt in PROMPTS))
    answers = crowd.join() + fresh.join()
    flushed = time.monotonic()
    eventually(lambda: agrees(server, "POST", "/flush_cache"), STORAGE_DEADLINE_S + 3.0, "the cache is flushed")
    flush_s = time.monotonic() - flushed
    while time.monotonic() - stopped < stopped_s:
        answers += Crowd(server, mine).ask(*([prompt] for prompt in PROMPTS)).join()
        server.flush_cache()
    kvd.signal(signal.SIGCONT)
    assert not wrong(answers, reference)
    assert max(answer.total_s for _, answer in answers) < NOISE * usual + STORAGE_DEADLINE_S
    assert flush_s < STORAGE_DEADLINE_S + 1.0
    comes_back_soon(server, reference, mine, PROMPTS)
    assert kvd.faults() == []


def test_storage_is_detached_and_attached_at_run_time_while_kvd_is_stopped(
    kvd: Daemon, server: SglangServer, reference: Answers
) -> None:
    mine = salt()
    fill(server, PROMPTS[:2], cache_salt=mine)
    kvd.signal(signal.SIGSTOP)
    extra = {"prefetch_threshold": 16, **extra_config(kvd.socket)}
    assert ask(server, PROMPTS[0], cache_salt=mine).output_ids == reference[PROMPTS[0]]
    began = time.monotonic()
    eventually(lambda: agrees(server, "DELETE", BACKEND), STORAGE_DEADLINE_S + 3.0, "storage is detached")
    assert ask(server, PROMPTS[0], cache_salt=salt()).output_ids == reference[PROMPTS[0]]
    server.attach_storage("dynamic", extra)
    assert ask(server, PROMPTS[0], cache_salt=salt()).output_ids == reference[PROMPTS[0]]
    usual = ask(server, PROMPTS[0], cache_salt=salt()).total_s
    assert time.monotonic() - began < 4 * NOISE * usual + 2 * STORAGE_DEADLINE_S
    kvd.signal(signal.SIGCONT)
    comes_back_soon(server, reference, mine, PROMPTS[:2])


# -- what a worker does to kvd -----------------------------------------------------------------------------------


def test_clearing_the_storage_backend_wipes_nothing(kvd: Daemon, server: SglangServer, reference: Answers) -> None:
    mine = salt()
    fill(server, PROMPTS[:2], cache_salt=mine)
    held = pages_held(kvd)
    assert held
    assert agrees(server, "POST", f"{BACKEND}/clear")
    assert pages_held(kvd) == held
    comes_back(server, reference, mine, PROMPTS[:2])


def test_a_killed_worker_leaves_no_lease_and_its_successor_is_served(
    kvd: Daemon, server: SglangServer, reference: Answers
) -> None:
    mine = salt()
    fill(server, PROMPTS, cache_salt=mine)
    (attached,) = kvd.status().workers
    crowd = Crowd(server, mine).ask(*([prompt] * 4 for prompt in PROMPTS))
    eventually(lambda: crowd.answers, 60, "the first answer")
    os.kill(attached.pid, signal.SIGKILL)
    eventually(lambda: _has_ended(attached.pid), 30, "the kernel has taken the process apart")
    closed = time.monotonic()
    eventually(lambda: not kvd.status().workers, 5, "kvd has noticed")
    assert time.monotonic() - closed < 0.1 + 0.4, "within 100 ms, and the noise of a busy machine"
    server.kill()
    crowd.wait()
    assert crowd.failures, "the clients saw their connections end"
    assert kvd.faults() == []
    server.start()
    server.wait_ready()
    plugin_ready(kvd)
    comes_back(server, reference, mine, PROMPTS)
    (successor,) = kvd.status().workers
    assert successor.pid != attached.pid
    assert successor.reservations == 0


def _has_ended(pid: int) -> bool:
    """A zombie has no descriptors any more."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
