"""What kvd's own tiers hold, as routers hear it: what came and left within requests is said afterwards, in order."""

from random import Random

import pytest
from msgspec.structs import replace

from kvd import wire
from kvd.daemon import holdings
from kvd.daemon.holdings import MOST_NAMESPACES, Holdings, block_hash
from kvd.daemon.labels import Labels
from kvd.daemon.mirror import Blocks
from kvd.sglang_events import AnyEvent, Cleared, Removed
from tests.node_world import BRANCH, KEYS, spec
from tests.two_tiers import TwoTiers

Held = dict[str, dict[str, Blocks]]


class Listener:
    """Follows what is said, as a router would."""

    def __init__(self, most_blocks: int = 10_000, labels: Labels | None = None) -> None:
        self.held: Held = {}
        self.sources: dict[str, tuple[wire.Source, str]] = {}
        self.woken = self.said = 0
        self.holdings = Holdings(most_blocks, labels if labels is not None else Labels(), self.say, self.wake)

    def wake(self) -> None:
        self.woken += 1

    def say(self, source: wire.Source, events: list[AnyEvent], why: str) -> None:
        self.sources[source.namespace] = source, why
        held = self.held.setdefault(source.namespace, {})
        self.said += len(events)
        for event in events:
            blocks = held.setdefault(event.medium or "", {})
            if isinstance(event, Cleared):
                blocks.clear()
            elif isinstance(event, Removed):
                assert all(blocks.pop(value, self) is not self for value in event.block_hashes), "it was held"
            else:
                parent = event.parent_block_hash
                for value in event.block_hashes:
                    blocks[value], parent = parent, value

    def drain(self) -> None:
        while self.holdings.drain():
            pass


def ram(world: TwoTiers) -> Held:
    found: Held = {}
    for group in world.node.residency:
        parent = None if group.parent_key == bytes(32) else block_hash(group.parent_key)
        found.setdefault(group.namespace.hex(), {}).setdefault(wire.RAM, {})[block_hash(group.key)] = parent
    return found


def only(held: Held, medium: str) -> Held:
    return {name: {medium: media[medium]} for name, media in held.items() if media.get(medium)}


def below(listener: Listener) -> set[tuple[str, int]]:
    return {(name, value) for name, media in listener.held.items() for value in media.get(wire.SHARED, {})}


def blocks_of(world: TwoTiers) -> set[tuple[str, int]]:
    return {(name[:16].hex(), block_hash(name[16:])) for name in world.tier.pages}


def test_a_router_hears_what_lies_in_ram_and_below_whatever_comes_and_goes() -> None:
    world, random = TwoTiers(), Random(7)
    listener = Listener(labels=world.node.labels)
    one = world.session(spec(1))
    world.put(one, KEYS[0])
    world.node.stock.follow(listener.holdings)  # after a warm start there are pages already
    two = world.session(spec(2, 0), spec(2, 1))
    for _ in range(60):
        world.now += random.choice([0.1, 30.0])
        keys = random.choice([*KEYS, BRANCH])[: random.randint(1, 15)]
        if random.random() < 0.5:
            world.put(one, keys)
        else:
            world.put(two, keys, ns=0)
            world.put(two, keys, ns=1)
        if random.random() < 0.3:
            world.settle()
        listener.drain()
        assert only(listener.held, wire.RAM) == ram(world)
    assert world.node.counters["ram_evicted"] > 0
    world.settle()
    listener.drain()
    assert world.tier.pages
    assert below(listener) == blocks_of(world)
    gone = list(world.tier.pages)[::2]
    world.node.stock.below_changed(2, [], gone)
    listener.drain()
    assert below(listener) == blocks_of(world) - {(name[:16].hex(), block_hash(name[16:])) for name in gone}
    world.node.stock.below_changed(2, gone, [])
    listener.drain()
    assert below(listener) == blocks_of(world)
    world.node.stock.below_forgotten(2)
    listener.drain()
    assert only(listener.held, wire.SHARED) == {}
    assert only(listener.held, wire.RAM) == ram(world)


def test_chains_are_said_together_and_nothing_within_the_request() -> None:
    listener = Listener()
    parent = bytes(32)
    for key in KEYS[0]:
        listener.holdings.came(wire.RAM, bytes(16) + key, parent)
        parent = key
    assert (listener.said, listener.woken) == (0, 1)
    listener.drain()
    for key in KEYS[0]:
        listener.holdings.left(wire.RAM, bytes(16) + key)
    listener.drain()
    assert (listener.said, listener.woken) == (2, 2)


def test_a_parent_that_one_tier_knows_is_told_for_all() -> None:
    listener = Listener()
    first, second = (bytes(16) + key for key in KEYS[0][:2])
    listener.holdings.came(wire.NVME, second, KEYS[0][0])
    for medium in (wire.NVME, wire.SHARED):
        for name in (first, second):
            listener.holdings.came(medium, name)
    listener.drain()
    chain = {block_hash(KEYS[0][0]): None, block_hash(KEYS[0][1]): block_hash(KEYS[0][0])}
    assert listener.held == {bytes(16).hex(): {wire.NVME: chain, wire.SHARED: chain}}


def test_a_namespace_is_described_once_a_worker_says_what_it_is() -> None:
    listener = Listener(labels=(labels := Labels()))
    known = spec(1)
    listener.holdings.came(wire.RAM, known.digest + KEYS[0][0])
    listener.drain()
    assert listener.sources[known.digest.hex()][0].block_tokens == 0
    labels.add(known)
    listener.holdings.tick({})
    source, why = listener.sources[known.digest.hex()]
    assert (source.pool, source.block_tokens, source.label, why) == ("kv", 4, "test", "")


@pytest.mark.parametrize("namespaces", [1, 3])
def test_what_does_not_fit_is_not_known_and_said_so(namespaces: int) -> None:
    listener = Listener(most_blocks=5)
    for n in range(12):
        listener.holdings.came(wire.NVME, bytes([n % namespaces]) * 16 + KEYS[0][n])
    listener.drain()
    assert sum(len(media[wire.NVME]) for media in listener.held.values()) == listener.holdings.blocks == 5
    assert all("more than 5 pages" in why for _, why in listener.sources.values())
    listener.holdings.forgotten(wire.NVME)
    listener.drain()
    assert listener.holdings.blocks == 0
    assert {why for _, why in listener.sources.values()} == {""}


def test_what_did_not_fit_once_is_forgotten_when_it_has_left() -> None:
    listener = Listener(most_blocks=5)
    names = [bytes(16) + key for key in KEYS[0][:8]]
    for name in names:
        listener.holdings.came(wire.NVME, name)
    for name in [names[0], *names[5:7], names[6]]:  # the last one is told twice
        listener.holdings.left(wire.NVME, name)
    listener.drain()
    (why,) = (why for _, why in listener.sources.values())
    assert "more than 5 pages" in why, "one is there and not known"
    listener.holdings.came(wire.NVME, names[7])
    listener.drain()
    ((_, why),) = listener.sources.values()
    assert (why, listener.holdings.blocks) == ("", 5)


def test_more_than_can_be_remembered_of_what_did_not_fit_stays_unknown_until_the_tier_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holdings, "_MOST_REFUSED", 2)
    listener = Listener(most_blocks=1)
    names = [bytes(16) + key for key in KEYS[0][:5]]
    for _ in range(2):
        for name in names:
            listener.holdings.came(wire.NVME, name)
        for name in names:
            listener.holdings.left(wire.NVME, name)
        listener.drain()
        ((_, why),) = listener.sources.values()
        assert "more than 1 pages" in why
        listener.holdings.forgotten(wire.NVME)
        listener.drain()
        ((_, why),) = listener.sources.values()
        assert why == ""


def test_namespaces_without_end_are_bounded() -> None:
    listener = Listener()
    for n in range(MOST_NAMESPACES + 10):
        listener.holdings.came(wire.RAM, n.to_bytes(16) + KEYS[0][0])
    listener.drain()
    assert len(listener.sources) == MOST_NAMESPACES
    assert listener.holdings.untold == 10


def test_a_namespace_that_holds_nothing_makes_room_for_another() -> None:
    listener = Listener()
    for n in range(MOST_NAMESPACES):
        listener.holdings.came(wire.RAM, n.to_bytes(16) + KEYS[0][0])
    for n in (3, 4):
        listener.holdings.left(wire.RAM, n.to_bytes(16) + KEYS[0][0])
    listener.drain()
    listener.holdings.tick({(4).to_bytes(16): ("http://a:1",)})
    for n in (5000, 5001):
        listener.holdings.came(wire.RAM, n.to_bytes(16) + KEYS[0][0])
    listener.drain()
    assert listener.held[(5000).to_bytes(16).hex()][wire.RAM]
    assert (5001).to_bytes(16).hex() not in listener.held, "a worker is attached with the other one"
    listener.holdings.tick({})
    listener.holdings.came(wire.RAM, (5001).to_bytes(16) + KEYS[0][0])
    listener.drain()
    assert listener.held[(5001).to_bytes(16).hex()][wire.RAM]
    assert len(listener.holdings.sources()) == MOST_NAMESPACES


def test_scratch_namespaces_are_not_told_of() -> None:
    listener = Listener(labels=(labels := Labels()))
    scratch = replace(spec(1), scratch=True)
    labels.add(scratch)
    listener.holdings.came(wire.RAM, scratch.digest + KEYS[0][0])
    listener.drain()
    labels.forget(scratch.digest)
    listener.holdings.left(wire.RAM, scratch.digest + KEYS[0][0])
    listener.drain()
    assert (listener.sources, listener.holdings.untold, listener.holdings.sources()) == ({}, 0, [])
