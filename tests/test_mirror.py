"""The mirror of a worker's publisher: exact when it says so, healed by replays, honest where they do not help."""

import os
from collections.abc import Mapping
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.daemon.mirror import MOST_MEDIA, Mirror
from kvd.sglang_events import GPU, AnyEvent, Cleared, Removed, Stored
from tests.publisher_model import ModelPublisher, any_events, removed, stored

SEQUENCES = int(os.environ.get("KVD_EVENT_SEQUENCES", "400"))  # per test
MANY = 1000


def truth(publisher: ModelPublisher) -> dict[str, set[int]]:
    return {medium: blocks for medium, blocks in publisher.held.items() if blocks}


def shown(mirror: Mirror) -> dict[str, set[int]]:
    return {medium: set(blocks) for medium, blocks in mirror.held.items() if blocks}


def heal(mirror: Mirror, publisher: ModelPublisher) -> list[AnyEvent]:
    """Ask and answer until nothing is missing."""
    changed: list[AnyEvent] = []
    for _ in range(8):
        if mirror.ask is None:
            return changed
        for seq, batch in publisher.replay(mirror.ask):
            changed += mirror.replayed(seq, batch)
        changed += mirror.replay_ended()
    raise AssertionError(f"still asking for {mirror.ask}: {mirror.why}")


@pytest.fixture
def publisher() -> ModelPublisher:
    return ModelPublisher()


@pytest.fixture
def mirror(publisher: ModelPublisher) -> Mirror:
    """One that has followed since the start."""
    mirror = Mirror(MANY)
    heal(mirror, publisher)
    assert mirror.exact
    return mirror


def test_a_worker_that_has_published_nothing_is_known_exactly(mirror: Mirror) -> None:
    assert (mirror.held, mirror.next) == ({}, 0)


def test_blocks_and_their_parents_are_followed(mirror: Mirror, publisher: ModelPublisher) -> None:
    mirror.live(*publisher.publish(stored([1, 2, 3]), stored([1], None, "CPU_PINNED")))
    mirror.live(*publisher.publish(stored([4], 3), removed([3, 2])))
    assert mirror.held == {GPU: {1: None, 4: 3}, "CPU_PINNED": {1: None}}
    assert mirror.exact


def test_who_comes_late_gets_the_history_again(publisher: ModelPublisher) -> None:
    for n in range(5):
        publisher.publish(stored([n]))
    mirror = Mirror(MANY)
    changed = heal(mirror, publisher)
    assert [event.block_hashes for event in changed if isinstance(event, Stored)] == [[0], [1], [2], [3], [4]]
    assert mirror.exact
    assert shown(mirror) == truth(publisher)


def test_who_comes_too_late_says_so_until_the_worker_clears(publisher: ModelPublisher) -> None:
    for n in range(20):
        publisher.publish(stored([n]))
    mirror = Mirror(MANY)
    heal(mirror, publisher)
    assert "before kvd listened" in mirror.why
    assert shown(mirror) == {GPU: set(range(12, 20))}
    mirror.live(*publisher.publish(Cleared(), stored([7])))
    assert mirror.exact
    assert shown(mirror) == {GPU: {7}}


def test_a_gap_is_asked_for_and_healed(mirror: Mirror, publisher: ModelPublisher) -> None:
    mirror.live(*publisher.publish(stored([1])))
    publisher.publish(removed([1]))
    assert mirror.live(*publisher.publish(stored([2]))) == []
    assert "lost" in mirror.why
    assert mirror.ask == 0
    assert heal(mirror, publisher) == [removed([1]), stored([2])]
    assert mirror.exact


def test_doubled_and_reordered_batches_change_nothing(mirror: Mirror, publisher: ModelPublisher) -> None:
    sent = [publisher.publish(stored([n]), removed([n - 2])) for n in range(6)]
    for seq in (0, 0, 2, 1, 0, 5, 4, 3, 2, 5):
        mirror.live(*sent[seq])
    heal(mirror, publisher)
    assert mirror.exact
    assert shown(mirror) == truth(publisher) == {GPU: {4, 5}}


def test_a_hole_beyond_the_replay_forgets_what_was_before(mirror: Mirror, publisher: ModelPublisher) -> None:
    mirror.live(*publisher.publish(stored([1])))
    for n in range(2, 20):
        publisher.publish(stored([n]), removed([n - 1]))
    mirror.live(*publisher.publish(stored([99])))
    assert heal(mirror, publisher)[0] == Cleared()
    assert not mirror.exact
    assert mirror.lost == 11
    assert shown(mirror)[GPU] <= truth(publisher)[GPU]


def test_a_worker_that_starts_again_under_old_numbers_is_noticed(mirror: Mirror, publisher: ModelPublisher) -> None:
    for n in range(3):
        mirror.live(*publisher.publish(stored([n])))
    publisher.restart()
    assert mirror.live(*publisher.publish(stored([50]))) == [Cleared(), stored([50])]
    heal(mirror, publisher)
    assert mirror.exact
    assert mirror.restarts == 1
    assert shown(mirror) == {GPU: {50}}


@pytest.mark.parametrize("published", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("seen_before", [1, 3])
def test_a_restart_while_nobody_listened_is_noticed_whatever_it_published(seen_before: int, published: int) -> None:
    publisher, mirror = ModelPublisher(), Mirror(MANY)
    heal(mirror, publisher)
    for n in range(seen_before):
        mirror.live(*publisher.publish(stored([n])))
    publisher.restart()
    for n in range(published):
        publisher.publish(stored([100 + n]))
    mirror.doubt()
    assert not mirror.exact
    mirror.live(*publisher.publish(stored([200])))
    heal(mirror, publisher)
    assert mirror.exact
    assert shown(mirror) == truth(publisher)


def test_a_broken_connection_that_lost_nothing_changes_nothing(mirror: Mirror, publisher: ModelPublisher) -> None:
    mirror.live(*publisher.publish(stored([1])))
    mirror.doubt()
    assert heal(mirror, publisher) == []
    assert mirror.exact


def test_a_lost_last_batch_is_found_by_a_check(mirror: Mirror, publisher: ModelPublisher) -> None:
    mirror.live(*publisher.publish(stored([1])))
    publisher.publish(stored([2]))
    mirror.check()
    assert mirror.exact, "a check alone is no reason for doubt"
    assert heal(mirror, publisher) == [stored([2])]
    assert mirror.exact


def test_without_replay_it_is_exact_from_the_start_or_the_next_clear(publisher: ModelPublisher) -> None:
    mirror = Mirror(MANY)
    mirror.no_replay()
    assert not mirror.exact
    mirror.live(*publisher.publish(stored([1])))
    assert mirror.exact, "the very first batch was seen"
    publisher.publish(stored([2]))
    mirror.live(*publisher.publish(stored([3])))
    assert mirror.no_replay() == [Cleared(), stored([3])]
    assert not mirror.exact
    mirror.doubt()
    mirror.no_replay()
    publisher.restart()
    mirror.live(*publisher.publish(stored([9])))
    mirror.no_replay()
    assert mirror.exact
    assert shown(mirror) == {GPU: {9}}


def test_memory_is_bounded_and_the_rest_is_said_to_be_unknown(publisher: ModelPublisher) -> None:
    mirror = Mirror(3)
    heal(mirror, publisher)
    assert mirror.live(*publisher.publish(stored([1, 2]), stored([3, 4], 2))) == [stored([1, 2])]
    assert "more than 3 blocks" in mirror.why
    assert shown(mirror) == {GPU: {1, 2}}
    mirror.live(*publisher.publish(Cleared(), *(stored([n], None, f"M{n}") for n in range(MOST_MEDIA + 1))))
    assert len(mirror.held) == MOST_MEDIA
    assert not mirror.exact


def test_batches_that_never_become_due_are_bounded(mirror: Mirror, publisher: ModelPublisher) -> None:
    publisher.publish(stored([0]))
    for n in range(5000):
        mirror.live(*publisher.publish(stored([n])))
    assert len(mirror._early) <= 1024


def test_a_replay_that_leaves_batches_out_is_asked_for_again(mirror: Mirror, publisher: ModelPublisher) -> None:
    for n in range(6):
        publisher.publish(stored([n]))
    mirror.check()
    assert mirror.ask is not None
    sent = publisher.replay(mirror.ask)
    for seq, batch in [*sent[:2], *sent[4:]]:
        mirror.replayed(seq, batch)
    mirror.replay_ended()
    assert "lost" in mirror.why
    heal(mirror, publisher)
    assert mirror.exact
    assert shown(mirror) == truth(publisher)


def follow(held: dict[str, set[int]], changed: list[AnyEvent]) -> Mapping[str, set[int]]:
    for event in changed:
        if isinstance(event, Cleared):
            held.clear()
        elif isinstance(event, Removed):
            held.get(event.medium or GPU, set()).difference_update(event.block_hashes)
        else:
            held.setdefault(event.medium or GPU, set()).update(event.block_hashes)
    return held


@settings(max_examples=SEQUENCES, deadline=None)
@given(st.randoms(use_true_random=True))
def test_exact_means_true_under_loss_doubling_reorder_and_restarts(random: Random) -> None:
    """Also: what is held is held, followers hear of every change, and a quiet network heals all that can be healed."""
    publisher, mirror = ModelPublisher(random.choice([1, 3, 8, 100])), Mirror(MANY)
    followed: dict[str, set[int]] = {}
    late: list[tuple[int, object]] = []
    past: dict[tuple[float, int], dict[str, set[int]]] = {(-1.0, -1): {}}  # the truth after each batch

    def verify() -> None:
        assert {medium: blocks for medium, blocks in followed.items() if blocks} == shown(mirror)
        last = past.get((mirror._times.get(mirror.next - 1, -1.0), mirror.next - 1))
        if last is not None:
            assert all(blocks <= last.get(medium, set()) for medium, blocks in shown(mirror).items())
            assert not mirror.exact or shown(mirror) == last

    def publish() -> tuple[int, object]:
        message = publisher.publish(*any_events(random))
        past[message[1].time_s, message[0]] = {medium: set(blocks) for medium, blocks in truth(publisher).items()}
        return message

    for _ in range(random.randint(1, 40)):
        action = random.choices(
            ["live", "lose", "late", "again", "restart", "break", "heal", "check", "part"],
            [20, 4, 4, 4, 1, 1, 5, 1, 2],
        )
        match action[0]:
            case "live":
                follow(followed, mirror.live(*publish()))
            case "lose":
                publish()
            case "late":
                late.append(publish())
            case "again" if late:
                follow(followed, mirror.live(*random.choice(late)))
            case "restart" | "break":
                if action[0] == "restart":
                    publisher.restart()
                late.clear()  # what was under way over a connection that broke does not come any more
                mirror.doubt()
            case "heal" if mirror.ask is not None:
                follow(followed, heal(mirror, publisher))
            case "check":
                mirror.check()
            case "part" if mirror.ask is not None:  # a publisher drops what its reader's full queue does not take
                for number, (seq, batch) in enumerate(publisher.replay(mirror.ask)):
                    if not number or random.random() < 0.7:
                        follow(followed, mirror.replayed(seq, batch))
                follow(followed, mirror.replay_ended()) if random.random() < 0.7 else mirror.check()
        verify()
    mirror.check()
    follow(followed, heal(mirror, publisher))
    verify()
    if mirror.exact:
        assert shown(mirror) == truth(publisher)
    follow(followed, mirror.live(*publisher.publish(Cleared(), stored([5]))))
    follow(followed, heal(mirror, publisher))
    assert mirror.exact
    assert shown(mirror) == {GPU: {5}}
