"""The messages' bytes: what an older or newer peer will see. Golden files are per release and never edited.

To add a message: run with KVD_WRITE_GOLDEN=1 and look at the difference. A changed line means that peers of the
previous release cannot talk to this one: then PROTOCOL must change too.
"""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd import wire
from kvd.errors import PeerError

GOLDEN = Path(__file__).parent / "golden" / f"wire-{wire.PROTOCOL}.json"
KEY, TICKET = bytes(range(32)), bytes(range(16))
SPEC = wire.NamespaceSpec(TICKET, 1 << 20, 64, 1, 2, "kv", "model rank 1/2", bytes(16))
TIER = wire.TierStatus("ram", 1 << 30, 1 << 20, 1, 2, 3, 4, 5, 6, 7)
WORKER = wire.WorkerStatus(3, 4242, "model rank 0/1", 1.5, ["kv"], "1/1", "closed", 1, 0, {"get_pages": 2})
DECISION = wire.GateDecision(
    1.5, 3, 4242, "model rank 0/1", "kv", "nvme", 15, 0, 1e9, 1 << 20, 1234.5, 4096, 64, "slower", "the tier is slower"
)
STREAM_SOURCE = wire.Source("", 0, "00ff", "kv", "model", "alice", 64)
SAMPLES: list[wire.Message] = [
    wire.Hello(1, "worker", "model rank 0/1"),
    wire.Join([SPEC]),
    wire.Join([SPEC], "30000-7"),
    wire.Ping(7),
    wire.Report("open: kvd does not answer", {"circuit_trips": 1}),
    wire.GetStatus(),
    wire.GetPrefixes(10),
    wire.Scan(1, 64),
    wire.EndScan(9, [0, 3]),
    wire.Check(),
    wire.Check(4096),
    wire.Welcome(1, 5, 3, TICKET, "ipc:///run/kvd/kvd.data", 1 << 30, 1 << 20, "0.1.0"),
    wire.Joined([0, 1]),
    wire.Pong(7, 1 << 20),
    wire.Refusal("no", "do this", 4),
    wire.Status(
        "0.1.0",
        5,
        77,
        1.5,
        "/run/kvd/kvd.sock",
        "memfd",
        3,
        [TIER],
        [WORKER],
        {"ram_hits": 2},
        1 << 20,
        -1,
        ["H100"],
        [],
    ),
    wire.Prefixes([wire.Prefix("00", "model kv", "ff", 2, 128, 4096, 0.5, True)], 1),
    wire.Scanned(9, -1, wire.SCANNED_ROW.pack(4096, 1, 4096, TICKET, TICKET, KEY)),
    wire.Checked(["a fault"], 3),
    wire.Checked([], 3, 4096),
    wire.GetDecisions(10),
    wire.FindPages("ff", TICKET, 16384),
    wire.GetNamespace(TICKET),
    wire.GetChain(TICKET, KEY),
    wire.EvictPages(TICKET, KEY, True, 4096),  # contradicts itself: tests send this to real daemons
    wire.RemoveBelow(TICKET, KEY, True),
    wire.Decisions([DECISION], 12, ["nvme"]),
    wire.PagesFound([wire.PageName(TICKET, KEY)], -1),
    wire.NamespaceKnown(SPEC),
    wire.Chain(KEY * 2, KEY),
    wire.Evicted(3, 1, 4096),
    wire.RemovedBelow([wire.TierRemoval("nvme", 3, "its process ended")]),
    wire.Pin(bytes(range(16)), KEY, False),
    wire.GetPins(),
    wire.GetQuotas(),
    wire.Pinned(7, 1 << 20),
    wire.Pins([wire.OnePin(bytes(range(16)), KEY, 7, 5, "model kv")], 1 << 20, 1 << 30),
    wire.Quotas([wire.TenantShare("alice", "nvme", 5, 3, None)]),
    wire.Lookup(1, 0, KEY, 2.0),
    wire.Lookup(1, 0, KEY, 2.0, 1.5, 7, KEY),
    wire.LeasePages(2, 0, KEY * 2, 2.0),
    wire.ReleaseLease(9, [1]),
    wire.ReservePages(3, 0, KEY, 3.0, KEY, False),
    wire.CommitPages(4, 9, wire.COMMIT_ROW.pack(4096, 1, TICKET)),
    wire.CommitPages(0, 9, wire.COMMIT_ROW.pack(4096, 1, TICKET), more=True),
    wire.Found(1, 12),
    wire.Leased(2, 9, wire.LEASED_ROW.pack(4096, 1, 4096, TICKET)),
    wire.Reserved(3, 9, wire.RESERVED_ROW.pack(4096, 1, wire.WRITE)),
    wire.Committed(4, 1),
    wire.GetSnapshot(5),
    wire.SnapshotPart(5, "node-1", 9, 7, STREAM_SOURCE, "late", wire.RAM, [(None, wire.pack_hashes([1, -2]))]),
    wire.SnapshotPart(5, "node-1", 9, 7, wire.Source("http://127.0.0.1:30000", 1, life="00ff", workers=("http://a",))),
]
DECODERS = {
    wire.ToDaemon: wire.decode_to_daemon,
    wire.FromDaemon: wire.decode_from_daemon,
    wire.FromWorker: wire.decode_from_worker,
    wire.ToWorker: wire.decode_to_worker,
    wire.ToStream: wire.decode_to_stream,
    wire.FromStream: wire.decode_from_stream,
}


def kinds(union: Any) -> tuple[Any, ...]:
    return getattr(union, "__args__", (union,))


def test_every_message_has_a_sample() -> None:
    known = {kind for union in DECODERS for kind in kinds(union)}
    assert known == {type(sample) for sample in SAMPLES}


def test_messages_have_the_bytes_they_always_had() -> None:
    now: dict[str, str] = {}
    for sample in SAMPLES:
        name = type(sample).__name__
        now[name if name not in now else f"{name}, with the fields of later"] = wire.encode(sample).hex()
    if os.environ.get("KVD_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
    assert now == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: type(s).__name__)
def test_every_message_survives_its_socket(sample: wire.Message) -> None:
    readers = [decode for union, decode in DECODERS.items() if type(sample) in kinds(union)]
    assert readers
    for decode in readers:
        assert decode(wire.encode(sample)) == sample


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: type(s).__name__)
def test_fields_of_a_newer_peer_are_ignored(sample: wire.Message) -> None:
    raw = msgspec.msgpack.decode(wire.encode(sample)) | {"a_field_of_tomorrow": [1, 2, 3]}
    decode = next(d for union, d in DECODERS.items() if type(sample) in kinds(union))
    assert decode(msgspec.msgpack.encode(raw)) == sample


@given(st.binary(max_size=200))
def test_noise_is_a_decode_error_and_nothing_else(noise: bytes) -> None:
    for decode in DECODERS.values():
        try:
            decode(noise)
        except PeerError:
            continue
