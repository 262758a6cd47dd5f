"""A batch in short: it says what the batch says, without tokens; noise is refused."""

import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.brief import Brief, Briefs, Emptied, Gone, Kept, first_frame
from kvd.errors import PeerError
from kvd.sglang_events import END, Cleared, Removed, seq_frame
from kvd.wire import TOPIC, Head, Source, Speed, pack_hashes
from tests.publisher_model import removed, stored

HEAD = Head("n", 5, Source("http://w", 1))
FIRST = first_frame(HEAD, [stored([1, -2], 7), removed([3], "DISK"), Cleared(), Cleared(medium="GPU")])
BRIEF = Brief(
    HEAD,
    [Kept("GPU", [(7, pack_hashes([1, -2]))]), Gone("DISK", pack_hashes([3])), Emptied(None), Emptied("GPU")],
    len(FIRST),
)
pack = msgspec.msgpack.encode


def frames(first: bytes, seq: int = 7) -> list[bytes]:
    return [first, seq_frame(seq), b"a batch that nobody looks at"]


def test_its_bytes_are_these() -> None:
    head = pack({"node": "n", "epoch": 5, "source": {"worker": "http://w", "rank": 1}})
    hashes = (1).to_bytes(8, "little") + (-2).to_bytes(8, "little", signed=True)
    changes = [[0, "GPU", [[7, hashes]]], [1, "DISK", (3).to_bytes(8, "little")], [2, None], [2, "GPU"]]
    assert TOPIC + pack([head, changes]) == FIRST


def test_what_a_batch_says_is_read_live_and_replayed() -> None:
    briefs = Briefs()
    assert briefs.read(frames(FIRST)) == briefs.read([b"", *frames(FIRST)]) == (7, BRIEF)
    assert briefs.read([b"", b"", END, b""]) is None


def test_batches_that_say_the_same_of_their_source_share_one_head() -> None:
    briefs = Briefs()
    one, same, other = (
        briefs.read(frames(first_frame(head, [])))
        for head in (HEAD, Head("n", 5, Source("http://w", 1)), Head("n", 5, Source("http://w", 1), "late"))
    )
    assert one is not None
    assert same is not None
    assert other is not None
    assert one[1].head is same[1].head
    assert other[1].head == Head("n", 5, Source("http://w", 1), "late")


def test_no_medium_is_the_gpu_and_nothing_removed_is_no_change() -> None:
    message = Briefs().read(frames(first_frame(HEAD, [Removed(block_hashes=[]), stored([1], None, None)])))
    assert message is not None
    assert message[1].changes == [Kept("GPU", [(None, pack_hashes([1]))])]


def test_events_that_go_on_where_the_one_before_ended_are_one_run() -> None:
    said = [
        stored([1], None), stored([2], 1), stored([3, 4], 2), stored([5], 2), stored([6], 5, "CPU_PINNED"),
        stored([7], 6), removed([4]), removed([3, 5]), removed([6], "CPU_PINNED"), Cleared(), Cleared(medium="GPU"),
        stored([1], None), stored([2]),
    ]  # fmt: skip
    message = Briefs().read(frames(first_frame(HEAD, said)))
    assert message is not None
    one, two, five, six, seven = (pack_hashes([n]) for n in (1, 2, 5, 6, 7))
    assert message[1].changes == [
        Kept("GPU", [(None, pack_hashes([1, 2, 3, 4])), (2, five)]), Kept("CPU_PINNED", [(5, six)]),
        Kept("GPU", [(6, seven)]), Gone("GPU", pack_hashes([4, 3, 5])), Gone("CPU_PINNED", six), Emptied(None),
        Emptied("GPU"), Kept("GPU", [(None, one), (None, two)]),
    ]  # fmt: skip
    assert said[0] == stored([1], None), "what is said is not changed"


@pytest.mark.parametrize("first", [b"", b"kv", TOPIC, b"kv-events"])
def test_a_workers_own_publisher_is_no_nodes_stream(first: bytes) -> None:
    with pytest.raises(PeerError):
        Briefs().read(frames(first))


@pytest.mark.parametrize(
    "change",
    [[3, "GPU"], [0, "GPU", None], [0, "GPU", [[None, b"x" * 9]]], [1, "GPU", b"x"], [0, "GPU", [[1 << 63, b"x" * 8]]],
     [0, None, []], [2], {"a": 1}],
)  # fmt: skip
def test_a_change_that_cannot_be_read_is_not_skipped(change: object) -> None:
    with pytest.raises(PeerError):
        Briefs().read(frames(TOPIC + pack([pack({"node": "n", "epoch": 5, "source": {}}), [[2, None], change]])))


def test_text_that_is_none_is_refused_like_anything_else() -> None:
    packed = pack([pack({"node": "n", "epoch": 5, "source": {}}), [[2, "NAME"]]])
    for wrong in (packed.replace(b"NAME", b"\xff\xff\xff\xff"), packed.replace(b"\xa1n", b"\xa1\xff")):
        assert wrong != packed
        with pytest.raises(PeerError):
            Briefs().read(frames(TOPIC + wrong))


@pytest.mark.parametrize(
    "speeds", [[["DISK", 0.0, 0.1]], [["DISK", float("nan"), 0.1]], [["DISK", 1e9, -1.0]], [["DISK", 1e9, 0.1]] * 17]
)
def test_speeds_that_cannot_be_and_too_many_are_refused(speeds: object) -> None:
    def said(speeds: object) -> list[bytes]:
        return frames(TOPIC + pack([pack({"node": "n", "epoch": 5, "source": {"speeds": speeds}}), []]))

    message = Briefs().read(said([["DISK", 1e9, 0.1]]))
    assert message is not None
    assert message[1].head.source.speeds == (Speed("DISK", 1e9, 0.1),)
    with pytest.raises(PeerError):
        Briefs().read(said(speeds))


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda cut: FIRST[3 : 3 + len(cut)] + cut)))
def test_noise_is_a_peer_error_and_nothing_else(noise: bytes) -> None:
    with pytest.raises(PeerError):
        Briefs().read(frames(TOPIC + noise))


@pytest.mark.parametrize(
    "changes",
    [
        [], [[2, None]] * 500, [[0, "GPU", []]] * 500, [[0, "GPU", [[None, b""]]]] * 500, [[0, "G" * 99, []]] * 500,
        [[0, "GPU", [[n << 40, b"12345678"] for n in range(500)]]], [[1, "GPU", b"12345678" * 500]],
    ],
    ids=["nothing", "emptied", "no runs", "empty runs", "long names", "short runs", "one run"],
)  # fmt: skip
def test_its_weight_is_no_less_than_the_memory_that_it_takes(changes: list[object]) -> None:
    """Or a peer could fill a router that counts it."""
    briefs, head = Briefs(), pack({"node": "n", "epoch": 5, "source": {}, "why": "y" * 1000})
    raw = [TOPIC + pack([head[:-1] + b"%d" % (n % 10), changes]) for n in range(10)]
    assert briefs.read(frames(raw[0])) is not None
    tracemalloc.start()
    kept = [Briefs().read(frames(one)) for one in raw]
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken <= sum(one[1].weight for one in kept if one is not None)
