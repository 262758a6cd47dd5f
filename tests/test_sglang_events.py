"""SGLang's KV events: every release's encoding is read, SGLang's own bytes are written back, noise is refused."""

import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd import sglang_events
from kvd.errors import PeerError
from kvd.pages import chain
from kvd.sglang_events import (
    GPU,
    Batch,
    Cleared,
    Removed,
    Stored,
    decode,
    encode,
    read_frames,
    seq_frame,
)
from kvd.wire.stream import Head, Source

CAPTURE = Path(__file__).parents[2] / "shared/lab/kv_events_capture.bin"
PAGES = [int.from_bytes(key[:8], signed=True) for key in chain(range(1, 9), 4)]
GOLDEN = bytes.fromhex(
    "93cb41d954fc402000009287a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391d3cf97adeedb59e05bb170617265"
    "6e745f626c6f636b5f68617368c0a9746f6b656e5f6964739401020304aa626c6f636b5f73697a6504a76c6f72615f6964c0a66d656469756d"
    "a347505587a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391cf4ebfa8a1f3c34151b1706172656e745f626c6f63"
    "6b5f68617368d3cf97adeedb59e05ba9746f6b656e5f6964739405060708aa626c6f636b5f73697a6504a76c6f72615f6964c0a66d65646975"
    "6daa4350555f50494e4e454400"
)
pack = msgspec.msgpack.encode


def stored(hashes: list[int], parent: int | None, tokens: object, medium: str | None = GPU, **more: str) -> Stored:
    return Stored(
        block_hashes=hashes, parent_block_hash=parent, token_ids=msgspec.Raw(pack(tokens)), block_size=4, lora_id=None,
        medium=medium, **more,
    )  # fmt: skip


def test_the_newest_release_is_read_and_written_byte_for_byte() -> None:
    batch = decode(GOLDEN)
    assert batch.events == [
        stored(PAGES[:1], None, [1, 2, 3, 4]),
        stored(PAGES[1:], PAGES[0], [5, 6, 7, 8], "CPU_PINNED"),
    ]
    assert (batch.time_s, batch.rank) == (1700000000.5, 0)
    assert encode(batch) == GOLDEN


def recorded() -> Iterator[list[bytes]]:
    raw, at = CAPTURE.read_bytes(), 0
    while at < len(raw):
        _, count = struct.unpack_from("<dI", raw, at)
        at += 12
        frames = []
        for _ in range(count):
            (length,) = struct.unpack_from("<I", raw, at)
            frames.append(raw[at + 4 : at + 4 + length])
            at += 4 + length
        yield frames


@pytest.mark.skipif(not CAPTURE.exists(), reason="no recording of a real SGLang beside the project")
def test_what_a_real_sglang_sent_is_read_and_written_back_byte_for_byte() -> None:
    seqs = []
    for frames in recorded():
        message = read_frames(frames)
        assert message is not None
        seq, payload = message
        batch = decode(payload)
        assert encode(batch) == payload
        for event in batch.events:
            if isinstance(event, Stored) and event.parent_block_hash is None:
                tokens = msgspec.msgpack.decode(event.token_ids)
                keys = chain(tokens, event.block_size)
                assert event.block_hashes == [int.from_bytes(key[:8], signed=True) for key in keys]
        seqs.append(seq)
    assert seqs == list(range(1, 24))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["BlockStored", [1, 2], None, [7] * 8, 4, None], stored([1, 2], None, [7] * 8, None)),
        (["BlockStored", [1], 9, [[7, 8]] * 4, 4, None, "CPU_PINNED"], stored([1], 9, [[7, 8]] * 4, "CPU_PINNED")),
        (
            ["BlockStoredWithMetadata", [1], 9, [7] * 4, 4, None, GPU, {"cache_salt": "s", "other": {"a": [1]}}],
            stored([1], 9, [7] * 4, cache_salt="s"),
        ),
        (["BlockRemoved", [1, 2]], Removed(block_hashes=[1, 2])),
        (["BlockRemoved", [1], GPU], Removed(block_hashes=[1], medium=GPU)),
        (["AllBlocksCleared"], Cleared()),
        ({"type": "BlockRemoved", "block_hashes": [2**64 - 1], "new": {"x": 1}}, Removed(block_hashes=[-1])),
    ],
)
def test_older_and_newer_shapes_mean_the_same(old: object, new: object) -> None:
    assert decode(pack([1.5, [old, ["AllBlocksCleared"]]])).events == [new, Cleared()]
    assert decode(pack([1.5, [old, {"type": "AllBlocksCleared"}], 3])).rank == 3


def test_frames_with_and_without_topic_live_and_replayed() -> None:
    for frames in ([b"kv", seq_frame(7), b"x"], [b"", b"kv", seq_frame(7), b"x"], [b"", seq_frame(7), b"x"]):
        assert read_frames(frames) == (7, b"x")
    for end in ([b"", b"", sglang_events.END, b""], [b"", sglang_events.END, b""]):
        assert read_frames(end) is None
    for wrong in ([b"x"], [b"", b"short", b"x"], [b""] * 5, []):
        with pytest.raises(PeerError):
            read_frames(wrong)


def test_a_nodes_stream_is_sglangs_with_one_more_key() -> None:
    batch = Batch(1.5, [Removed(block_hashes=[1], medium="DISK", kvd=Head("n", 5, Source(namespace="ff"), "late"))])
    assert msgspec.msgpack.decode(encode(batch)) == [
        1.5,
        [
            {
                "type": "BlockRemoved", "block_hashes": [1], "medium": "DISK",
                "kvd": {"node": "n", "epoch": 5, "source": {"namespace": "ff"}, "why": "late"},
            }
        ],
        None,
    ]  # fmt: skip
    assert decode(encode(batch)) == batch


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda cut: GOLDEN[: len(cut)] + cut)))
def test_noise_is_a_peer_error_and_nothing_else(noise: bytes) -> None:
    with pytest.raises(PeerError):
        decode(noise)


@pytest.mark.parametrize("event", [["X"], {"type": "Y"}, {"type": "BlockStored"}, 3, [], ["BlockRemoved", ["a"]]])
def test_an_event_that_cannot_be_read_is_not_skipped(event: object) -> None:
    with pytest.raises(PeerError):
        decode(pack([1.5, [{"type": "AllBlocksCleared"}, event]]))
