"""How fast does the router find who holds a prompt's blocks, next to Dynamo's Rust index?

Lookups: kvd's Index and `RadixTree` of ai-dynamo-runtime, each in a process of its own, filled with the same blocks
and asked the same chains in turn; median microseconds, from a list of hashes to a dict of workers. All answers are
asserted equal. Bytes per block are what the process grew by, per distinct block.

Events: batches of 32 blocks, of 16 or 64 tokens, as kvd's stream of a node bears them (SGLang's frames and encoding,
with a head and, behind the topic, the same in short: others ignore both), published over TCP as fast as they go, until
a query finds the last: by `python -m dynamo.indexer` (asked over HTTP, as it is made to be), and by the router's
own Follow, View and Index in a process of their own. A block an event is what SGLang says (record_store in its
mem_cache/events.py); all 32 in one is what costs others the least. kvd's router looks at no tokens: SGLang's own
hashes are what it uses. `--ingest` measures only this.
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
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
import zmq

from kvd import wire
from kvd.brief import first_frame
from kvd.sglang_events import GPU, Batch, Stored, encode, seq_frame
from tools.bench._kvd import scratch
from tools.bench._peers import Missing, Peer, end, made_environment, start_peer
from tools.bench._table import ROOT, Options, Run, Samples, Table, finish, interleave, options, progress, spread

DYNAMO = "ai-dynamo-runtime==1.6.1"
SIZES = [(workers, blocks) for blocks in (10**5, 10**6) for workers in (8, 64, 512)]
QUICK = [(8, 10**5), (512, 10**5), (64, 10**6)]
COUNT = 64  # lookups a case and round
BATCH, BATCHES_A_CHAIN = 32, 4  # blocks
STREAMS = [(tokens, event) for tokens in (16, 64) for event in (1, BATCH)]  # tokens a block, blocks an event
WAIT_S = 120.0


def main() -> None:
    wanted = options(__doc__, lambda add: add.add_argument("--ingest", action="store_true", help="events only"))
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
        for workers, blocks in () if wanted.rest.ingest else QUICK if wanted.quick else SIZES:
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
        table.notes.append(f"batches a second from the socket to an answer, {who}: {spread(rates, 0)}")
        figures[f"{who} batches_per_s"] = round(statistics.median(rates))
    gains = {stream: ingest.ratio(_named("kvd", *stream), _named("dynamo", *stream)) for stream in STREAMS}
    known = {stream: ratio for stream, ratio in gains.items() if ratio}
    table.notes += [f"batches, {_named('kvd / dynamo', *stream)}: {ratio:.2f}" for stream, ratio in known.items()]
    figures |= {f"ingest_{tokens}_{event}": round(ratio, 3) for (tokens, event), ratio in known.items()}
    finish(
        "router_index",
        table,
        wanted,
        {
            "lookup_geomean": statistics.geometric_mean(ratios) if ratios else None,
            "lookup_worst": min(ratios, default=None),
            "ingest": min(known.values(), default=None),
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


def _named(who: str, tokens: int, event: int) -> str:
    return f"{who}, {tokens} tokens a block, {event} an event"


class _Stream:
    """A node's batches of one worker, chains of four; and what the last chain is. `event`: blocks in an event."""

    def __init__(self, count: int, block_tokens: int, event: int) -> None:
        self._draw = random.Random(1)
        head = wire.Head("bench", 1, wire.Source("http://worker", block_tokens=block_tokens))
        self.block_tokens, self.event = block_tokens, event
        self.messages: list[tuple[bytes, bytes]] = []
        for number in range(count):
            if number % BATCHES_A_CHAIN == 0:
                self.chain: list[int] = []
                self.tokens: list[int] = []
            events = [self._stored() for _ in range(0, BATCH, event)]
            events[0].kvd = head
            self.messages.append((first_frame(head, events), encode(Batch(time.time(), [*events], 0))))

    def named(self, who: str) -> str:
        return _named(who, self.block_tokens, self.event)

    def _stored(self) -> Stored:
        hashes = [self._draw.getrandbits(64) - (1 << 63) for _ in range(self.event)]
        tokens = self._draw.choices(range(128_000), k=self.event * self.block_tokens)
        parent = self.chain[-1] if self.chain else None
        self.chain += hashes
        self.tokens += tokens
        return Stored(
            block_hashes=hashes, parent_block_hash=parent, token_ids=msgspec.Raw(msgspec.msgpack.encode(tokens)),
            block_size=self.block_tokens, lora_id=None, medium=GPU,
        )  # fmt: skip


def _ingest(folder: Path, dynamo: Path | None, wanted: Options) -> Samples:
    """Batches a second, by who took them, how many tokens their blocks have, and how many blocks their events."""
    runs: list[Run] = []
    for block_tokens, event in STREAMS:
        count = 8_000 if wanted.quick else 32_000
        progress(f"{count} batches, blocks of {block_tokens} tokens, {event} an event")
        stream = _Stream(count, block_tokens, event)
        runs.append(partial(_take_kvd, folder, stream))
        if dynamo:
            runs.append(partial(_take_dynamo, folder, dynamo, stream))
    return interleave(runs, wanted.rounds(2, 5), warm_up=0)


def _take_kvd(folder: Path, stream: _Stream, _: int) -> Mapping[str, float]:
    with _Node(stream) as node:
        arguments = [node.endpoint, node.replay_endpoint, json.dumps(stream.chain)]
        env = {"PYTHONPATH": str(ROOT)}
        with start_peer("kvd-ingest", Path(sys.prefix), "_ingest.py", arguments, folder, env) as peer:
            node.answer_snapshot()
            started = node.publish()
            done = peer.ask(timeout_s=WAIT_S)
    assert done["blocks"] == BATCH * len(stream.messages)
    return {stream.named("kvd"): len(stream.messages) / (done["at"] - started)}


def _take_dynamo(folder: Path, environment: Path, stream: _Stream, _: int) -> Mapping[str, float]:
    port = _free_port()
    with _Node(stream) as node, (folder / "dynamo-indexer.log").open("wb") as log:
        process = subprocess.Popen(
            [str(environment / "bin" / "python"), "-m", "dynamo.indexer", "--port", str(port), "--threads", "1",
             "--block-size", str(stream.block_tokens), "--model-name", "m", "--workers", f"1={node.endpoint}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "DYN_LOG": "error"},
        )  # fmt: skip
        try:
            started = node.publish()
            at = _wait_for_answer(port, stream, process)
        except Missing as why:
            progress(f"dynamo.indexer is missing: {why}")
            return {}
        finally:
            process.terminate()
            end(process)
    return {stream.named("dynamo"): len(stream.messages) / (at - started)}


def _wait_for_answer(port: int, stream: _Stream, process: "subprocess.Popen[bytes]") -> float:
    """When a query for the last chain found all of it."""
    asked = json.dumps({"token_ids": stream.tokens, "model_name": "m"})
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("POST", "/query", asked, {"Content-Type": "application/json"})
            scores = json.loads(connection.getresponse().read()).get("scores", {})
            if max(scores.get("1", {"": 0}).values()) == len(stream.tokens):
                return time.monotonic()
        except (OSError, ValueError):
            pass
        finally:
            connection.close()
        time.sleep(0.005)
    raise Missing(f"it never had the last block (exit status {process.poll()})")


class _Node:
    """A node's two sockets: it sends everything once somebody has subscribed, from a thread."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._context = zmq.Context()
        self._publisher, self._router = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        self._publisher.setsockopt(zmq.SNDHWM, 0)
        self.endpoint, self.replay_endpoint = (
            f"tcp://127.0.0.1:{one.bind_to_random_port('tcp://127.0.0.1')}" for one in (self._publisher, self._router)
        )
        self._sender = threading.Thread(target=self._send, daemon=True)

    def publish(self) -> float:
        """When the first message was sent."""
        if not self._publisher.poll(WAIT_S * 1000):
            raise Missing("it did not subscribe")
        self._publisher.recv()
        started = time.monotonic()
        self._sender.start()
        return started

    def answer_snapshot(self) -> None:
        """It has nothing yet."""
        if not self._router.poll(WAIT_S * 1000):
            raise Missing("it did not ask for a snapshot")
        who, _, asked = self._router.recv_multipart()
        request = msgspec.msgpack.decode(asked, type=wire.GetSnapshot).request
        part = wire.SnapshotPart(request, "bench", 1, -1, None)
        self._router.send_multipart([who, b"", wire.encode(part)])

    def _send(self) -> None:
        for number, (first, batch) in enumerate(self._stream.messages):
            self._publisher.send_multipart([first, seq_frame(number), batch])

    def __enter__(self) -> "_Node":
        return self

    def __exit__(self, *_: object) -> None:
        if self._sender.is_alive():
            self._sender.join(WAIT_S)
        self._context.destroy(linger=0)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
