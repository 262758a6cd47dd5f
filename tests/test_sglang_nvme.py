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

pytestmark = [needs_sglang, pytest.mark.slow, pytest.mark.timeout(600)]

ARENA_MIB = 96  # half of the prompts' pages
PROMPTS = TREE[:20]


@pytest.fixture
def kvd() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="kvd-test-") as name:
        settings = {"nvme__path": Path(name) / "nvme", "nvme__size_bytes": 1024 * MIB, "nvme__write_delay_s": 0.1}
        with Daemon(Path(name) / "run", ARENA_MIB, 16, **settings) as daemon:
            yield daemon


def test_what_memory_does_not_hold_comes_back_from_disk_and_is_right(kvd: Daemon) -> None:
    reference = reference_answers()
    pages = pages_of(PROMPTS, PAGE_TOKENS)
    with closing_server(worker("nvme", kvd.socket)) as server:
        server.start()
        server.wait_ready()
        plugin_ready(kvd)
        assert not wrong(fill(server, PROMPTS), reference)
        eventually(lambda: kvd.status().tiers[1].pages >= pages, 30, "all pages are written")
        assert kvd.status().tiers[0].pages < pages
        come_back(server, reference)

        kvd.kill()
        kvd.arena_path.unlink()
        server.kill()
        kvd.start()
        server.start()
        server.wait_ready()
        plugin_ready(kvd)
        eventually(lambda: not kvd.status().tiers[1].trouble, 20)
        assert kvd.status().tiers[0].pages == 0
        come_back(server, reference)
    assert kvd.faults() == []


def come_back(server: SglangServer, reference: Answers) -> None:
    """From kvd, whole and right; from RAM or from disk."""
    for prompt in PROMPTS:
        server.flush_cache()
        answer = ask(server, prompt)
        assert answer.output_ids == reference[prompt]
        assert answer.cached.storage == reusable(prompt, PAGE_TOKENS)
