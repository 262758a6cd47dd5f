"""A router's view of a node: exact when it says so, whatever is lost, doubled, late, or killed in between."""

import tracemalloc

import pytest

from kvd import wire
from kvd.brief import Brief, Kept
from kvd.daemon.stream import Stream
from kvd.errors import PeerError
from kvd.router import early, view
from kvd.router.early import MOST_BYTES
from kvd.router.numbering import Place
from kvd.router.sources import MOST_SOURCES
from kvd.router.view import ASK_AGAIN_S, SILENT_S, Ask
from kvd.sglang_events import GPU, Cleared
from tests.node_model import ModelNode, ModelWorker, Seen, read
from tests.publisher_model import removed, stored


@pytest.fixture
def node() -> ModelNode:
    return ModelNode(1, 8, [ModelWorker("http://a"), ModelWorker("http://b")])


@pytest.fixture
def seen(node: ModelNode) -> Seen:
    """One that is exact already."""
    seen = Seen()
    assert seen.why == "no snapshot has come yet"
    seen.heal(node)
    assert seen.why == ""
    return seen


def test_blocks_are_seen_with_their_parents_by_worker_and_medium(node: ModelNode, seen: Seen) -> None:
    a, b = node.workers
    node.say(a, stored([1, 2, 3]), stored([1], None, "CPU_PINNED"))
    node.say(b, stored([1, 2]), removed([2]))
    seen.hear(node)
    assert seen.held == node.truth
    assert seen.held[Place("n", "http://a", 0, "", GPU)] == {1: None, 2: 1, 3: 2}
    assert seen.why == ""
    assert seen.view.sources["http://a", 0, ""].source.block_tokens == 4


def test_a_late_router_gets_all_with_one_snapshot(node: ModelNode) -> None:
    for n in range(50):
        node.say(node.workers[n % 2], stored([3 * n, 3 * n + 1, 3 * n + 2]), removed([3 * n + 1]))
        node.flush()
    seen = Seen()
    seen.heal(node)
    assert seen.why == ""
    assert seen.held == node.truth
    assert (seen.view.snapshots, seen.view.replays) == (1, 0)


def test_what_happens_while_a_snapshot_is_made_is_in_it_or_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_BLOCKS", 2)
    node = ModelNode(1, 100, [ModelWorker("http://a")])
    (a,) = node.workers
    node.say(a, stored(list(range(10))))
    seen = Seen()
    wanted = seen.view.ask(seen.now)
    assert wanted is not None
    for step, part in enumerate(node.snapshot(wanted.request)):
        node.say(a, removed([9 - step, step]), stored([100 + step], 5))
        seen.hear(node)
        seen.view.part(part, seen.now)
    seen.hear(node)
    assert seen.why == ""
    assert seen.held == node.truth


def test_a_lost_batch_is_repeated(node: ModelNode, seen: Seen) -> None:
    node.say(node.workers[0], stored([1]))
    node.flush()
    node.sent.clear()
    node.say(node.workers[0], stored([2], 1))
    seen.hear(node)
    assert seen.why == f"batches from {seen.view.seq + 1} on are missing"
    seen.heal(node)
    assert seen.why == ""
    assert seen.held == node.truth
    assert (seen.view.snapshots, seen.view.replays) == (1, 1)


def test_what_cannot_be_repeated_any_more_comes_as_a_snapshot(node: ModelNode, seen: Seen) -> None:
    for n in range(20):
        node.say(node.workers[0], stored([n]))
        node.flush()
    node.sent.clear()
    node.say(node.workers[0], removed([0]))
    seen.hear(node)
    seen.heal(node)
    assert seen.why == ""
    assert seen.held == node.truth
    assert seen.view.snapshots == 2


def test_another_life_of_the_node_begins_with_a_snapshot(node: ModelNode, seen: Seen) -> None:
    node.say(node.workers[0], stored([1]))
    seen.hear(node)
    following = ModelNode(2, 8, node.workers[1:])
    following.say(following.workers[0], stored([7]))
    seen.hear(following)
    assert seen.why == "no snapshot has come yet"
    seen.heal(following)
    assert seen.why == ""
    assert seen.held == following.truth == {Place("n", "http://b", 0, "", GPU): {7: None}}


def test_silence_and_a_broken_connection_are_not_exact(node: ModelNode, seen: Seen) -> None:
    seen.now += SILENT_S + 1
    assert "said nothing" in seen.why
    seen.heal(node)
    assert seen.why == ""
    seen.view.doubt()
    assert "connection broke" in seen.why
    seen.heal(node)
    assert seen.why == ""


def test_the_answer_of_another_life_makes_nothing_exact_of_the_one_before(node: ModelNode, seen: Seen) -> None:
    """A node that started again has nothing to repeat from there on: its answer is an end, of no life."""
    seen.view.doubt()
    seen.now += ASK_AGAIN_S
    assert seen.view.ask(seen.now) == Ask(seen.view.seq + 1, 0)
    seen.view.replay_ended(seen.now)
    assert "connection broke" in seen.why
    assert seen.view.ask(seen.now) is None, "not at once again"
    seen.now += ASK_AGAIN_S
    assert seen.view.ask(seen.now) is not None
    node.stream.say(wire.Source())
    seen.hear(node)
    assert seen.why == ""


def test_an_idle_node_stays_exact_and_is_asked_nothing(node: ModelNode, seen: Seen) -> None:
    asked = seen.view.replays
    for _ in range(20):
        seen.now += 1.0
        node.stream.say(wire.Source())
        seen.hear(node)
        assert (seen.why, seen.view.ask(seen.now)) == ("", None)
    assert (seen.view.snapshots, seen.view.replays) == (1, asked)


def test_a_source_that_is_replaced_while_a_snapshot_is_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PART_BLOCKS", 2)
    for parts_before in range(4):
        node = ModelNode(1, 100, [before := ModelWorker("http://a")])
        node.say(before, stored([1, 2, 3, 4]))
        seen = Seen()
        wanted = seen.view.ask(seen.now)
        assert wanted is not None
        parts = node.snapshot(wanted.request)
        for _ in range(parts_before):
            seen.view.part(next(parts), seen.now)
        node.stream.say(before.source, [Cleared()], "its events come from elsewhere now")
        node.workers[0] = after = ModelWorker("http://a")
        node.say(after, stored([77]))
        for part in parts:
            seen.view.part(part, seen.now)
        seen.hear(node)
        assert seen.why == seen.view.sources["http://a", 0, ""].why == ""
        assert seen.held == node.truth == {Place("n", "http://a", 0, "", GPU): {77: None}}


def test_all_is_told_anew_when_that_is_wanted(node: ModelNode, seen: Seen) -> None:
    node.say(node.workers[0], stored([1, 2]))
    seen.hear(node)
    seen.index.clear(seen.holders.number(Place("n", "http://a", 0, "", GPU)))  # type: ignore[arg-type]
    seen.view.renew()
    assert seen.why == "no snapshot has come yet"
    node.say(node.workers[0], stored([3], 2))
    seen.hear(node)
    seen.view.renew()
    seen.heal(node)
    assert (seen.why, seen.held, seen.view.snapshots) == ("", node.truth, 2)


def test_what_the_node_does_not_know_exactly_is_passed_on(node: ModelNode, seen: Seen) -> None:
    a = node.workers[0]
    a.mirror.doubt()
    node.stream.say(a.source, [], a.why)
    seen.hear(node)
    assert seen.why == ""
    assert "connection" in seen.view.sources["http://a", 0, ""].why


def test_clearing_reaches_one_source_and_where_it_is_said_one_medium(node: ModelNode, seen: Seen) -> None:
    a, b = node.workers
    for worker in (a, b):
        node.say(worker, stored([1]), stored([1], None, "CPU_PINNED"))
    node.say(a, Cleared())
    seen.hear(node)
    assert {place.worker for place in seen.held} == {"http://b"}
    node.stream.say(b.source, [Cleared(medium=GPU)])
    seen.hear(node)
    assert {place.medium for place in seen.held} == {"CPU_PINNED"}


def test_a_node_that_is_left_leaves_nothing(node: ModelNode, seen: Seen) -> None:
    node.say(node.workers[0], stored([1]))
    seen.hear(node)
    seen.view.close()
    assert seen.index.held == {}
    assert len(seen.holders) == 0
    assert seen.why


@pytest.mark.parametrize("run", [(1 << 63, b"x" * 8), (None, b"x")])
def test_a_part_whose_hashes_are_none_is_refused_as_a_whole(node: ModelNode, run: tuple[int | None, bytes]) -> None:
    seen = Seen()
    wanted = seen.view.ask(seen.now)
    assert wanted is not None
    source = node.workers[0].source
    raw = wire.encode(wire.SnapshotPart(wanted.request, "n", 1, -1, source, "", GPU, [(None, b"y" * 8), run]))
    with pytest.raises(PeerError):
        seen.view.part(wire.decode_from_stream(raw), seen.now)
    assert seen.held == {}


def test_sources_without_end_are_bounded(seen: Seen) -> None:
    stream = Stream("n", 1, 8)
    for n in range(MOST_SOURCES + 10):
        stream.say(wire.Source(f"http://{n}"), [stored([n])])
        for message in stream.flush(1.0):
            seen.view.batch(*read(message), seen.now)
    assert len(seen.view.sources) == MOST_SOURCES
    assert seen.view.crowded
    assert len(seen.held) == MOST_SOURCES - 2, "two were there before, and hold nothing"


LARGE = MOST_BYTES // 8


@pytest.mark.parametrize("known", [False, True], ids=["before the snapshot", "after a gap"])
def test_batches_that_come_too_early_are_bounded_by_their_bytes(node: ModelNode, known: bool) -> None:
    seen = Seen()
    if known:
        seen.heal(node)
    head, first = wire.Head("n", 1, node.workers[0].source), seen.view.seq + 2
    tracemalloc.start()
    for seq in range(first, first + 40):
        seen.view.batch(seq, Brief(head, [Kept(GPU, [(None, bytes(LARGE))])], LARGE), seen.now)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert LARGE < taken < MOST_BYTES + LARGE


def test_what_was_not_kept_of_them_is_asked_for_again(
    node: ModelNode, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "MOST_BYTES", 1000)
    node.flush()
    node.stream = Stream("n", 1, 100)
    for n in range(40):
        node.say(node.workers[0], stored([n]))
        node.flush()
    del node.sent[5]
    seen = Seen()
    seen.heal(node)
    assert seen.why == ""
    assert seen.held == node.truth
    for n in range(40, 80):
        node.say(node.workers[0], stored([n]))
        node.flush()
    del node.sent[5]
    seen.hear(node)
    assert "missing" in seen.why
    seen.heal(node)
    assert seen.why == ""
    assert seen.held == node.truth
    assert seen.view.snapshots == 1, "a replay was enough"


def test_parts_that_wait_for_a_lost_batch_are_bounded_by_their_bytes(
    node: ModelNode, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "_MOST_WAITING", 10_000)
    seen.view.renew()
    wanted = seen.view.ask(seen.now + ASK_AGAIN_S)
    assert wanted is not None
    for seq in (0, *[9] * 4):
        runs = [(None, bytes(4000))]
        part = wire.SnapshotPart(wanted.request, "n", 1, seq, node.workers[0].source, "", GPU, runs)
        seen.view.part(part, seen.now)
    assert seen.why == "no snapshot has come yet", "it is asked for anew"
    seen.heal(node)
    assert (seen.why, seen.held) == ("", node.truth)


def test_parts_that_went_in_are_not_counted_as_waiting(node: ModelNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comes a moment before the batch that it follows, as it may: they are read from two sockets."""
    monkeypatch.setattr(view, "_MOST_WAITING", 10_000)
    seen = Seen()
    wanted = seen.view.ask(seen.now)
    assert wanted is not None
    source = node.workers[0].source
    head, last = wire.Head("n", 1, source), 20
    for seq in range(last + 1):
        runs = [(None, bytes(4000))]
        part = wire.SnapshotPart(wanted.request, "n", 1, seq, source if seq < last else None, "", GPU, runs)
        seen.view.part(part, seen.now)
        if seq:
            seen.view.batch(seq, Brief(head, [], 10), seen.now)
    assert seen.why == ""


def test_a_node_of_another_release_is_asked_at_once_when_it_can_be_read(node: ModelNode) -> None:
    seen = Seen()
    for _ in range(3):
        while seen.view.ask(seen.now) is None:
            seen.now += 1.0
        seen.view.spoilt(seen.now)
    assert seen.view.ask(seen.now + ASK_AGAIN_S) is None, "what cannot be read is asked for less and less often"
    seen.view.batch(0, Brief(wire.Head("n", 1, node.workers[0].source), [], 10), seen.now)
    assert seen.view.ask(seen.now) is not None
