"""A real SGLang worker whose pages come back from disk: after a reboot, and because they do not all fit in memory."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, Daemon, eventually
from tests.sglang_node import (
    PAGE_TOKENS,
    TREE,
    Answers,
    ask,
    closing_server,
    fill,
    needs_sglang,
    pages_of,
    plugin_ready,
    reference_answers,
    reusable,
    worker,
    wrong,
)
from tools.sglang_cpu.server import SglangServer

pytestmark = [needs_sglang, pytest.mark.timeout(600)]

ARENA_MIB = 96  # a third of the prompts' pages
PROMPTS = TREE[:40]


@pytest.fixture(scope="module")
def reference() -> Answers:
    return reference_answers()


@pytest.fixture(scope="module")
def kvd() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="kvd-test-") as name:
        settings = {"nvme__path": Path(name) / "nvme", "nvme__size_bytes": 1024 * MIB, "nvme__write_delay_s": 0.1}
        with Daemon(Path(name) / "run", ARENA_MIB, 16, **settings) as daemon:
            yield daemon


@pytest.fixture(scope="module")
def server(kvd: Daemon) -> Iterator[SglangServer]:
    with closing_server(worker("nvme", kvd.socket)) as server:
        server.start()
        server.wait_ready()
        plugin_ready(kvd)
        yield server


def test_more_than_memory_holds_comes_back_and_is_right(
    kvd: Daemon, server: SglangServer, reference: Answers
) -> None:
    assert not wrong(fill(server, PROMPTS), reference)
    pages = pages_of(PROMPTS, PAGE_TOKENS)
    eventually(lambda: kvd.status().tiers[1].pages >= pages, 30, "all pages are written")
    assert kvd.status().tiers[0].pages < pages
    for prompt in PROMPTS:
        server.flush_cache()
        answer = ask(server, prompt)
        assert answer.output_ids == reference[prompt]
        assert answer.cached.storage == reusable(prompt, PAGE_TOKENS)
    assert kvd.status().counters["pages_promoted"] > 0
    assert kvd.faults() == []


def test_after_a_reboot_the_disk_has_them(kvd: Daemon, server: SglangServer, reference: Answers) -> None:
    fill(server, PROMPTS[:4])
    eventually(lambda: kvd.status().tiers[1].counters["waiting_to_be_written"] == 0, 30)
    kvd.kill()
    kvd.arena_path.unlink()
    server.kill()
    kvd.start()
    server.start()
    server.wait_ready()
    plugin_ready(kvd)
    eventually(lambda: not kvd.status().tiers[1].trouble, 20)
    assert kvd.status().tiers[0].pages == 0
    for prompt in PROMPTS[:4]:
        answer = ask(server, prompt)
        assert answer.output_ids == reference[prompt]
        assert answer.cached.storage + answer.cached.device == reusable(prompt, PAGE_TOKENS)
    assert kvd.status().counters["pages_promoted"] > 0
    assert kvd.faults() == []
