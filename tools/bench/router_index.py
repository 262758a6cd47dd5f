"""How fast does the router find who holds a prompt's blocks, next to Dynamo's Rust index?

Lookups: kvd's Index and `RadixTree` of ai-dynamo-runtime, each in a process of its own, filled with the same blocks
and asked the same chains in turn; median microseconds, from a list of hashes to a dict of workers. All answers are
asserted equal. Bytes per block are what the process grew by, per distinct block.

Events: 32 blocks each (of 16 tokens), as SGLang frames and encodes them, published over TCP as fast as they are taken,
until a query finds the last: by `python -m dynamo.indexer` (asked over HTTP, as it is made to be), and by a process
that decodes them, stores them in an Index and looks. It does not hash tokens: SGLang's own hashes are what it uses.
"""

import http.client
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec
import zmq

from tools.bench._kvd import scratch
from tools.bench._peers import Missing, Peer, end, made_environment, start_peer
from tools.bench._table import ROOT, Options, Run, Samples, Table, finish, interleave, options, progress, spread

DYNAMO = "ai-dynamo-runtime==1.6.1"
SIZES = [(workers, blocks) for blocks in (10**5, 10**6) for workers in (8, 64, 512)]
QUICK = [(8, 10**5), (512, 10**5), (64, 10**6)]
COUNT = 64  # lookups a case and round
EVENT, BLOCK_TOKENS, EVENTS_A_CHAIN = 32, 16, 4
WAIT_S = 120.0


def main() -> None:
    wanted = options(__doc__)
    table = Table(
        "The router's index: lookups in microseconds, median (min..max of the rounds)",
        ("workers, blocks", "prompt, known", "kvd", "dynamo", "dynamo / kvd"),
    )
    try:
        dynamo: Path | None = made_environment("dynamo", (DYNAMO,), "Dynamo")
    except Missing as why:
        dynamo = None
        table.notes.append(f"dynamo is missing: {why}")
    ratios: list[float] = []
    sizes: list[float] = []
    figures: dict[str, object] = {}
    with scratch() as folder:
        for workers, blocks in QUICK if wanted.quick else SIZES:
            progress(f"{workers} workers, {blocks} blocks")
            label = f"{workers}, 10^{round(math.log10(blocks))}"
            samples, grown = _lookups(folder, dynamo, workers, blocks, wanted)
            ratios += _add_rows(table, label, samples, figures)
            if "dynamo" in grown:
                sizes.append(grown["kvd"] / grown["dynamo"])
            table.notes.append(f"{label}: bytes a block: " + ", ".join(f"{k} {v:.0f}" for k, v in grown.items()))
            figures |= {f"{label} {who} bytes": round(size, 1) for who, size in grown.items()}
        ingest = _ingest(folder, dynamo, wanted)
    for who, rates in ingest.rounds.items():
        table.notes.append(f"events a second from the socket to an answer, {who}: {spread(rates, 0)}")
        figures[f"{who} events_per_s"] = round(statistics.median(rates))
    finish(
        "router_index",
        table,
        wanted,
        {
            "lookup_geomean": statistics.geometric_mean(ratios) if ratios else None,
            "lookup_worst": min(ratios, default=None),
            "ingest": ingest.ratio("kvd", "dynamo"),
            "bytes_per_block": max(sizes, default=None),
        },
        figures,
    )


def _lookups(
    folder: Path, dynamo: Path | None, workers: int, blocks: int, wanted: Options
) -> tuple[Samples, dict[str, float]]:
    """The times of each case, and bytes a block, by whose index."""
    environments = {"kvd": Path(sys.prefix)} | ({"dynamo": dynamo} if dynamo else {})
    grown: dict[str, float] = {}
    with ExitStack() as stack:
        peers = {}
        for who, environment in environments.items():
            arguments = [who, str(workers), str(blocks)]
            peers[who] = stack.enter_context(start_peer(who, environment, "_peer_index.py", arguments, folder))
            grown[who] = peers[who].ask(timeout_s=WAIT_S, do="fill")["bytes_per_block"]
        names: list[str] = peers["kvd"].ask(do="cases")["names"]  # type: ignore[assignment]
        answers: dict[str, set[float]] = {name: set() for name in names}
        runs: list[Run] = [partial(_ask, who, peer, name, answers) for name in names for who, peer in peers.items()]
        samples = interleave(runs, wanted.rounds(5, 15))
    for name, said in answers.items():
        assert len(said) == 1, f"{workers} workers, {blocks} blocks, {name}: the answers differ"
    return samples, grown


def _ask(who: str, peer: Peer, name: str, answers: dict[str, set[float]], _: int) -> Mapping[str, float]:
    told = peer.ask(do="lookup", case=name, count=COUNT)
    answers[name].add(told["answers"])
    return {f"{who} {name}": told["us"]}


def _add_rows(table: Table, label: str, samples: Samples, figures: dict[str, object]) -> list[float]:
    ratios = []
    for name in [case.removeprefix("kvd ") for case in samples.rounds if case.startswith("kvd ")]:
        ours, theirs = (samples.rounds.get(f"{who} {name}") for who in ("kvd", "dynamo"))
        ratio = samples.ratio(f"dynamo {name}", f"kvd {name}")
        table.add(label, name, spread(ours, 1), spread(theirs, 1), f"{ratio:.1f}" if ratio else "missing")
        figures[f"{label} {name}"] = [round(statistics.median(times), 2) for times in (ours, theirs) if times]
        ratios += [ratio] if ratio else []
    return ratios


class _Stream:
    """Messages of one worker, each an event, chains of four; and what the last chain is."""

    def __init__(self, count: int) -> None:
        draw = random.Random(1)
        encode = msgspec.msgpack.Encoder().encode
        self.messages = []
        for number in range(count):
            if number % EVENTS_A_CHAIN == 0:
                self.chain: list[int] = []
                self.tokens: list[int] = []
            hashes = [draw.getrandbits(64) - (1 << 63) for _ in range(EVENT)]
            tokens = [draw.randrange(128_000) for _ in range(EVENT * BLOCK_TOKENS)]
            parent = self.chain[-1] if self.chain else None
            event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens,
                     "block_size": BLOCK_TOKENS, "lora_id": None, "medium": "GPU"}  # fmt: skip
            self.messages.append(encode([time.time(), [event], 0]))
            self.chain += hashes
            self.tokens += tokens


def _ingest(folder: Path, dynamo: Path | None, wanted: Options) -> Samples:
    """Events a second, by who took them."""
    count = 8_000 if wanted.quick else 32_000
    progress(f"{count} events")
    stream = _Stream(count)
    runs: list[Run] = [partial(_take_kvd, folder, stream)]
    if dynamo:
        runs.append(partial(_take_dynamo, folder, dynamo, stream))
    return interleave(runs, wanted.rounds(2, 5), warm_up=0)


def _take_kvd(folder: Path, stream: _Stream, _: int) -> Mapping[str, float]:
    env = {"PYTHONPATH": str(ROOT)}
    with (
        _publisher(stream) as (endpoint, publish),
        start_peer("kvd-ingest", Path(sys.prefix), "_ingest.py", [endpoint], folder, env) as peer,
    ):
        started = publish()
        taken = peer.ask(timeout_s=WAIT_S, chain=stream.chain)
        took = time.monotonic() - started
        assert taken["events"] == len(stream.messages)
    return {"kvd": len(stream.messages) / took}


def _take_dynamo(folder: Path, environment: Path, stream: _Stream, _: int) -> Mapping[str, float]:
    port = _free_port()
    with _publisher(stream) as (endpoint, publish), (folder / "dynamo-indexer.log").open("wb") as log:
        process = subprocess.Popen(
            [str(environment / "bin" / "python"), "-m", "dynamo.indexer", "--port", str(port), "--threads", "1",
             "--block-size", str(BLOCK_TOKENS), "--model-name", "m", "--workers", f"1={endpoint}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "DYN_LOG": "error"},
        )  # fmt: skip
        try:
            started = publish()
            _wait_for_answer(port, stream, process)
            took = time.monotonic() - started
        except Missing as why:
            progress(f"dynamo.indexer is missing: {why}")
            return {}
        finally:
            process.terminate()
            end(process)
    return {"dynamo": len(stream.messages) / took}


def _wait_for_answer(port: int, stream: _Stream, process: "subprocess.Popen[bytes]") -> None:
    """Until a query for the last chain finds all of it."""
    asked = json.dumps({"token_ids": stream.tokens, "model_name": "m"})
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("POST", "/query", asked, {"Content-Type": "application/json"})
            scores = json.loads(connection.getresponse().read()).get("scores", {})
            if scores.get("1", {}).get("0") == len(stream.tokens):
                return
        except (OSError, ValueError):
            pass
        finally:
            connection.close()
        time.sleep(0.005)
    raise Missing(f"it never had the last block (exit status {process.poll()})")


@contextmanager
def _publisher(stream: _Stream) -> Iterator[tuple[str, Callable[[], float]]]:
    """A worker's publisher: where it is, and what sends everything once somebody has subscribed, from a thread."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.setsockopt(zmq.SNDHWM, 0)
        publisher.setsockopt(zmq.LINGER, 0)
        port = publisher.bind_to_random_port("tcp://127.0.0.1")

        def send() -> None:
            for number, message in enumerate(stream.messages):
                publisher.send_multipart([b"kv-events", number.to_bytes(8, "big"), message])

        sender = threading.Thread(target=send, daemon=True)

        def publish() -> float:
            if not publisher.poll(WAIT_S * 1000):
                raise Missing("it did not subscribe")
            publisher.recv()
            started = time.monotonic()
            sender.start()
            return started

        yield f"tcp://127.0.0.1:{port}", publish
        if sender.is_alive():
            sender.join(WAIT_S)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
