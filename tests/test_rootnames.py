"""Whether a publisher's names are ours, by the tokens of first blocks."""

import msgspec
import pytest

from kvd.daemon.rootnames import _ENOUGH, RootNames
from kvd.pages import chain
from kvd.sglang_events import AnyEvent, Removed, Stored

SIZE = 4


def name(tokens: list[int]) -> int:
    return int.from_bytes(chain(tokens, SIZE)[0][:8], signed=True)


def first(tokens: list[int], hash: int, *, parent: int | None = None, raw: bytes | None = None, **more: str) -> Stored:
    packed = msgspec.Raw(msgspec.msgpack.encode(tokens) if raw is None else raw)
    return Stored(
        block_hashes=[hash], parent_block_hash=parent, token_ids=packed, block_size=SIZE, lora_id=None, **more
    )  # fmt: skip


def wrong(n: int) -> Stored:
    return first([n, 1, 2, 3], 7)


def looked(*events: AnyEvent) -> RootNames:
    names = RootNames()
    for event in events:
        names.look([event])
    return names


def test_one_right_name_settles_it() -> None:
    tokens = [5, 6, 7, 8, 9, 10, 11, 12]
    right = first(tokens, name(tokens[:SIZE]))
    assert not looked(right, *map(wrong, range(100))).strange
    assert not looked(*map(wrong, range(_ENOUGH - 1)), right, *map(wrong, range(100))).strange


def test_some_wrong_names_and_no_right_one_make_a_stranger_for_good() -> None:
    assert not looked(*map(wrong, range(_ENOUGH - 1))).strange
    tokens = [5, 6, 7, 8]
    assert looked(*map(wrong, range(_ENOUGH)), first(tokens, name(tokens))).strange


@pytest.mark.parametrize(
    "event",
    [
        first([1, 2, 3, 4], 7, parent=3),
        first([1, 2, 3, 4], 7, cache_salt="s"),
        first([1, 2, 3, 4], 7, lora_name="a"),
        first([], 7, raw=msgspec.msgpack.encode([[1, 2], [2, 3], [3, 4], [4, 5]])),
        first([], 7, raw=msgspec.msgpack.encode("tokens")),
        first([-1, 2, 3, 4], 7),
        first([1, 2], 7),
        Removed(block_hashes=[7]),
    ],
    ids=["not a first block", "salted", "adapter", "pairs", "no tokens", "below zero", "too few", "removed"],
)
def test_what_cannot_be_told_settles_nothing(event: AnyEvent) -> None:
    assert not looked(*[event] * 100).strange
