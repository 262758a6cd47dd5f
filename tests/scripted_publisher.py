"""A worker as far as KV events go: SGLang's frames on SGLang's sockets, and /server_info, by orders of one JSON line.

    python -m tests.scripted_publisher HTTP_PORT EVENTS_PORT REPLAY_PORT|0 RANKS BUFFER_STEPS map|array

It imports nothing of kvd: what it sends is written down here once more. Orders: {"do": "store" | "remove" | "clear",
..., "rank": 0, "lose": false, "block": 4}; "lose" takes a number and is remembered for replays, but is not published;
"block" is how many tokens one has, "tokens" all of them.
{"do": "fill", "blocks": n, "chain": m}: n blocks in chains of m, for benchmarks.
"""

import json
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import zmq

END = (-1).to_bytes(8, "big", signed=True)
BLOCK = 4
PER_BATCH = 256  # blocks


class Rank:
    """One publisher."""

    def __init__(self, context: Any, number: int, events: int, replay: int, steps: int) -> None:
        self.number, self.seq = number, 0
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=steps)
        self.pub = context.socket(zmq.PUB)
        self.pub.bind(f"tcp://127.0.0.1:{events + number}")
        self.replay = None
        if replay:
            self.replay = context.socket(zmq.ROUTER)
            self.replay.bind(f"tcp://127.0.0.1:{replay + number}")

    def publish(self, events: list[Any], lose: bool = False) -> None:
        payload = msgspec.msgpack.encode([time.time(), events, self.number])
        if not lose:
            self.pub.send_multipart((b"kv-events", self.seq.to_bytes(8, "big"), payload))
        self.buffer.append((self.seq, payload))
        self.seq += 1

    def serve_replay(self) -> None:
        if self.replay is None or not self.replay.poll(0):
            return
        client, _, start = self.replay.recv_multipart()
        for seq, payload in self.buffer:
            if seq >= int.from_bytes(start, "big"):
                self.replay.send_multipart((client, b"", b"kv-events", seq.to_bytes(8, "big"), payload))
        self.replay.send_multipart((client, b"", b"", END, b""))


def fill(publisher: Rank, blocks: int, chain: int) -> None:
    """Hashes all over the 64 bits, as real ones are."""
    for first in range(0, blocks, PER_BATCH):
        numbers = range(first, min(blocks, first + PER_BATCH))
        hashes = [(n * 0x9E3779B97F4A7C15) % (1 << 64) - (1 << 63) for n in numbers]
        chains = (hashes[at : at + chain] for at in range(0, len(hashes), chain))
        publisher.publish([event_of({"do": "store", "hashes": some}, "map") for some in chains])


def event_of(order: dict[str, Any], shape: str) -> Any:
    hashes, medium, block = order.get("hashes", []), order.get("medium", "GPU"), order.get("block", BLOCK)
    tokens = order.get("tokens", [7] * (block * len(hashes)))
    stored = [hashes, order.get("parent"), tokens, block, None, medium]
    if shape == "array":
        rows = {"store": ["BlockStored", *stored], "remove": ["BlockRemoved", hashes, medium]}
        return rows.get(order["do"], ["AllBlocksCleared"])
    names = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
    return {
        "store": {"type": "BlockStored", **dict(zip(names, stored, strict=True))},
        "remove": {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium},
        "clear": {"type": "AllBlocksCleared"},
    }[order["do"]]


def serve_info(port: int, info: dict[str, Any]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": "0.5.23", "kv_events": info}).encode()
            self.send_response(200 if self.path == "/server_info" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    HTTPServer.allow_reuse_address = True
    threading.Thread(target=HTTPServer(("127.0.0.1", port), Handler).serve_forever, daemon=True).start()


def main() -> None:
    http, events, replay, ranks, steps = map(int, sys.argv[1:6])
    info = {
        "publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": events, "topic": "kv-events",
        "block_size": BLOCK, "dp_size": ranks,
    }  # fmt: skip
    if replay:
        info["replay_endpoint_port_base"] = replay
    context = zmq.Context()
    publishers = [Rank(context, number, events, replay, steps) for number in range(ranks)]
    serve_info(http, info)
    orders = zmq.Poller()
    orders.register(sys.stdin, zmq.POLLIN)
    for publisher in publishers:
        if publisher.replay is not None:
            orders.register(publisher.replay, zmq.POLLIN)
    print("ready", flush=True)
    while True:
        ready = dict(orders.poll())
        for publisher in publishers:
            publisher.serve_replay()
        if sys.stdin.fileno() in ready:
            line = sys.stdin.readline()
            if not line:
                break
            order = json.loads(line)
            if order["do"] == "fill":
                fill(publishers[0], order["blocks"], order["chain"])
                print("done", flush=True)
                continue
            publishers[order.get("rank", 0)].publish([event_of(order, sys.argv[6])], order.get("lose", False))
            print("done", flush=True)
    context.destroy(0)


if __name__ == "__main__":
    main()
