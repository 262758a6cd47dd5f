"""Dynamo's indexer, as PyPI ships it, reads a node's stream: any consumer of SGLang's events can."""

import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.event_stream import ScriptedWorker, free_ports
from tests.harness import Daemon, PluginProcess, eventually, span

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venvs/dynamo/bin/python"
BLOCK = 4  # the scripted worker's; all its tokens are 7

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no ai-dynamo-runtime in .venvs/dynamo"),
]


@contextmanager
def indexer(endpoint: str, port: int, log: Path) -> Iterator[None]:
    command = [str(PYTHON), "-m", "dynamo.indexer", "--block-size", str(BLOCK), "--port", str(port), "--threads", "1"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--workers", f"1={endpoint}"], stdout=out, stderr=out, cwd=ROOT)
        try:
            yield
        finally:
            process.kill()
            process.wait()


def known_tokens(port: int) -> int:
    """How many of twelve tokens Dynamo finds at the node; -1 while it does not answer."""
    body = json.dumps({"token_ids": [7] * 12, "model_name": "default"}).encode()
    headers = {"content-type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/query", body, headers), timeout=5
        ) as answer:
            return int(json.load(answer)["scores"].get("1", {}).get("0", 0))
    except OSError:
        return -1


def test_dynamo_finds_what_a_node_says_of_its_workers(tmp_path: Path) -> None:
    ports = free_ports(3)
    endpoint, log = f"tcp://127.0.0.1:{ports}", tmp_path / "dynamo.log"
    with ScriptedWorker() as worker, tempfile.TemporaryDirectory(prefix="kvd-") as folder:
        events = {"events__endpoint": endpoint, "events__workers": json.dumps([worker.url])}
        with (
            Daemon(Path(folder) / "run", **events) as kvd,
            PluginProcess(kvd.socket) as plugin,
            indexer(endpoint, ports + 2, log),
        ):
            eventually(lambda: known_tokens(ports + 2) == 0, 30, "Dynamo answers")

            def heard() -> bool:
                worker.do("store", 1, -2)  # again until Dynamo has subscribed
                return known_tokens(ports + 2) == 2 * BLOCK

            eventually(heard, 30, "Dynamo knows both blocks")
            assert plugin.do("wait")
            plugin.do("put", keys=span(20))  # pages of kvd's own tiers have no tokens: they must do no harm
            worker.do("remove", -2)
            eventually(lambda: known_tokens(ports + 2) == BLOCK, 30, "Dynamo has dropped one")
            worker.do("store", 3, 4, parent=1)
            eventually(lambda: known_tokens(ports + 2) == 3 * BLOCK, 30, "Dynamo knows three")
    assert "ERROR" not in log.read_text()
