"""Pieces' ids are the whole text's, whatever the tokenizer; the fast backend is used only where it is right."""

import asyncio
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvd.router.tokens import cuts as cuts_module
from kvd.router.tokens import tokenizer as backends
from kvd.router.tokens.blocks import Chain, Naming, hashes
from kvd.router.tokens.cuts import cut_tokens, cuts
from kvd.router.tokens.encode import AT_ONCE_BYTES, Encoder
from kvd.router.tokens.folder import ModelFolder
from kvd.router.tokens.memo import Memo, marks
from kvd.router.tokens.outcome import NoTokens
from kvd.router.tokens.tokenizer import Reference, fastest
from tests import router_models

ROOT = Path(__file__).parents[1]
SMOL = ROOT / ".models/smollm2-135m/tokenizer.json"
PAGE = Naming(4)


def folder(made: tokenizers.Tokenizer) -> ModelFolder:
    return ModelFolder(made.to_str(), {"bos_token": "<|bos|>", "eos_token": "<|eos|>"})


OVERLAPPING = ["<a>", "<a>b", "x<c", "<c>", "zz", "<ok>"]


def overlapping() -> tokenizers.Tokenizer:
    made = router_models.byte_level()
    made.add_special_tokens([*OVERLAPPING, "<|bos|>", "<|eos|>"])
    return made


KINDS = {
    "overlapping": overlapping,
    "bytes": lambda: router_models.with_special(router_models.byte_level()),
    "digits alone": lambda: router_models.with_special(router_models.digits_alone()),
    "bytes with bos": lambda: router_models.with_special(
        router_models.byte_level(r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"), bos=True
    ),
    "prepended": lambda: router_models.with_special(router_models.prepended()),
    "metaspace always": lambda: router_models.with_special(router_models.metaspace("always")),
    "metaspace first": lambda: router_models.with_special(router_models.metaspace("first")),
    "stripping": lambda: router_models.with_special(router_models.byte_level(), rstrip=True),
}
if SMOL.exists():
    KINDS["smollm2"] = lambda: tokenizers.Tokenizer.from_file(str(SMOL))
ENCODERS: dict[str, Encoder] = {}


def encoder(kind: str) -> Encoder:
    """One for the module, with cuts wherever they are allowed and a memo that overflows."""
    if kind not in ENCODERS:
        reference = Reference(folder(KINDS[kind]()))
        ENCODERS[kind] = Encoder(reference, memo_bytes=40_000, backend=reference, least_cut_bytes=1)
    return ENCODERS[kind]


SPECIAL = [*router_models.SPECIAL, "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
PIECES = st.one_of(
    st.sampled_from(
        [*SPECIAL, *OVERLAPPING, " ", "\n", "  ", "<|", "|>", "a", " b", "12", "é", "你", "\u0301", "▁", "user\n"]
    ),
    st.text(max_size=6),
)
TEXTS = st.lists(PIECES, max_size=25).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), grow=st.lists(TEXTS, max_size=3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_pieces_and_memory_give_the_ids_of_the_whole_text(kind: str, texts: list[str], grow: list[str]) -> None:
    made = encoder(kind)
    for text in [*texts, *("".join([texts[0], *grow[:n]]) for n in range(1, len(grow) + 1)), texts[0]]:
        try:
            text.encode()
        except UnicodeEncodeError:
            with pytest.raises(NoTokens):
                made.encode(text)
            continue
        encoded = made.encode(text)
        assert encoded.ids == made.reference.encode([text])[0]
        assert made.surround(encoded, text).ids == made.reference.encode([text], specials=True)[0]
        assert made.hashes(encoded, PAGE) == hashes(list(encoded.ids), PAGE)
    assert made.faults() == []


def test_only_tokenizers_that_allow_it_are_cut() -> None:
    allowed = {kind: bool(encoder(kind).cut_tokens) for kind in KINDS}
    assert allowed["bytes"]
    assert allowed["prepended"]
    assert not allowed["metaspace first"], "its pieces depend on where they stand"
    assert not allowed["stripping"], "its tokens take the spaces behind them along"


def test_a_token_that_another_could_swallow_is_no_cut() -> None:
    made = router_models.byte_level()
    made.add_special_tokens(OVERLAPPING)
    assert cut_tokens(made.to_str()) == [b"<a>b", b"x<c", b"<ok>"], "<a>, <c> and zz may be part of something else"


def test_of_thousands_of_added_tokens_a_few_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    alone = cuts_module._alone
    monkeypatch.setattr(cuts_module, "_alone", lambda *given: asked.append(given[0]) or alone(*given))
    made = router_models.byte_level()
    made.add_special_tokens([f"<unused{n}>" for n in range(6000)] + ["<end>"])
    assert cut_tokens(made.to_str(), "{{ '<unused7>' }}") == [b"<unused7>"]
    assert cut_tokens(made.to_str())[0] == b"<end>"
    assert len(asked) < 20, "each is compared with all others"


@given(TEXTS, TEXTS, st.integers(1, 40))
def test_a_longer_text_begins_with_the_cuts_of_the_shorter(text: str, more: str, least: int) -> None:
    tokens = [token.encode() for token in SPECIAL]
    short, long = text.encode("utf-8", "ignore"), (text + more).encode("utf-8", "ignore")
    if long.startswith(short):
        found = cuts(short, tokens, least)
        assert cuts(long, tokens, least)[: len(found)] == found
        assert all(b - a >= least for a, b in zip([0, *found], found, strict=False))


class Counted:
    """A backend that counts what it is given."""

    name = "counted"

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.bytes = 0
        self.threads: set[str] = set()

    def encode(self, texts: Sequence[str]) -> "list[array[int]]":
        self.bytes += sum(len(text.encode()) for text in texts)
        self.threads.add(threading.current_thread().name)
        return self.reference.encode(texts)


def conversation(turns: int) -> str:
    draw = Random(turns)  # the same beginning for every length
    draw.seed(5)
    return "".join(
        f"<|turn|>user\n{' '.join(draw.choices(router_models.TEXTS[:4], k=8))}<|end|>\n" for _ in range(turns)
    )


def test_a_conversation_only_encodes_what_is_new() -> None:
    reference = Reference(folder(KINDS["bytes"]()))
    counted = Counted(reference)
    made = Encoder(reference, backend=counted)
    whole = len(conversation(30).encode())
    for turns in range(1, 31):
        assert made.encode(conversation(turns)).ids == reference.encode([conversation(turns)])[0]
    assert counted.bytes < 1.1 * whole, "every byte about once, not once a turn"
    assert made.stats().trunks == 1
    assert made.stats().bytes < 4 * whole


def test_conversations_that_part_share_their_beginning() -> None:
    reference = Reference(folder(KINDS["bytes"]()))
    counted = Counted(reference)
    made = Encoder(reference, backend=counted)
    system = conversation(10)
    made.encode(system)
    before = counted.bytes
    for name in range(20):
        text = f"{system}<|turn|>user\n{name}<|end|>"
        encoded = made.encode(text)
        assert encoded.ids == reference.encode([text])[0]
        assert made.hashes(encoded, PAGE) == hashes(encoded.ids, PAGE)
    assert counted.bytes - before < 20 * 40
    assert made.faults() == []


def remembered(memo: Memo, name: str, tokens: int) -> None:
    """One text with one cut, at its end."""
    text = name.encode() * 300
    assert not memo.find(text, marks(text))
    memo.grow(None, text, marks(text), [len(text)], [array("I", range(tokens))])


def test_the_memo_stays_within_its_bytes_and_lets_the_longest_unused_go() -> None:
    memo = Memo(20_000)
    remembered(memo, "first", 500)
    for number in range(2, 40):
        remembered(memo, str(number), 500)
        assert memo.find(b"first" * 300, marks(b"first" * 300)), "it is used all the time"
        assert memo.faults() == []
    stats = memo.stats()
    assert stats.bytes <= 20_000
    assert stats.evicted
    assert not memo.find(b"2" * 300, marks(b"2" * 300))
    remembered(memo, "large", 50_000)
    assert memo.stats().bytes <= 20_000, "one that is too large does not stay"
    assert memo.faults() == []


def test_two_threads_that_encode_the_same_agree() -> None:
    memo = Memo(1 << 20)
    text = b"a" * 300 + b"b" * 10
    start = memo.grow(None, text, marks(text), [300], [array("I", [1, 2, 3])])
    one = memo.grow(start, text, marks(text), [310], [array("I", [4])])
    other = memo.grow(start, text, marks(text), [310], [array("I", [4])])
    third = memo.grow(start, b"a" * 300 + b"c" * 20, marks(text), [320], [array("I", [5, 6])])
    assert one is not None
    assert other is not None
    assert third is not None
    assert list(one.ids()) == list(other.ids()) == [1, 2, 3, 4]
    assert list(third.ids()) == [1, 2, 3, 5, 6]
    assert memo.stats().trunks == 2
    assert memo.faults() == []


def test_texts_of_the_same_marks_are_still_compared() -> None:
    memo = Memo(1 << 20)
    text, other = b"a" * 300, b"a" * 255 + b"b" * 45
    memo.grow(None, text, [1], [100, 200, 300], [array("I", [n]) for n in range(3)])
    found = memo.find(other, [1])
    assert found is not None
    assert (found.end, list(found.ids())) == (200, [0, 1])
    assert memo.find(b"b" * 300, [1]) is None
    assert memo.find(text[:100], [1]) is not None


def test_marks_are_of_beginnings() -> None:
    text = bytes(range(256)) * 40
    assert len(marks(text)) == 3 + len(text) // 2048
    assert marks(text)[:5] == marks(text[:4096] + b"other")
    assert marks(text[:255]) == []


def test_long_texts_are_encoded_in_a_thread_and_short_ones_where_they_are() -> None:
    reference = Reference(folder(KINDS["bytes"]()))
    counted = Counted(reference)
    AT_ONCE_BYTES["counted"] = 1000
    try:
        made = Encoder(reference, backend=counted)
        asyncio.run(made.encode_soon("short"))
        assert counted.threads == {"MainThread"}
        text = conversation(10)
        assert asyncio.run(made.encode_soon(text)).ids == reference.encode([text])[0]
        assert any(name.startswith("tokens") for name in counted.threads)
    finally:
        del AT_ONCE_BYTES["counted"]
        made.close()


def test_the_fast_backend_is_used_where_its_ids_are_the_references() -> None:
    pytest.importorskip("fastokens")
    reference = Reference(folder(KINDS["bytes"]()))
    backend, note = fastest(reference)
    assert (backend.name, note) == ("fastokens", "")
    texts = ["", "naïve <|turn|> 你好", conversation(3)]
    assert backend.encode(texts) == reference.encode(texts)
    assert backend.encode(texts[1:2]) == reference.encode(texts[1:2])


def test_a_fast_backend_with_other_ids_is_not_used_and_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        name = "fastokens"

        def __init__(self, reference: Reference) -> None:
            self.reference = reference

        def encode(self, texts: Sequence[str]) -> "list[array[int]]":
            return self.reference.encode([text.replace("\u3000", " ") for text in texts])

    reference = Reference(folder(KINDS["bytes"]()))
    monkeypatch.setattr(backends, "Fast", Wrong)
    backend, note = fastest(reference)
    assert backend is reference
    assert "other ids" in note


def test_nobody_waits_for_the_memo_while_a_text_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    memo, text, ids = Memo(1 << 20), b"a" * 300, array("I", range(80))
    waited: list[bool] = []
    extend = Chain.extend

    def extend_and_look(chain: Chain, given: Sequence[int]) -> None:
        other = threading.Thread(target=memo.find, args=(text, marks(text)))  # the event loop, in life
        other.start()
        other.join(1.0)
        waited.append(other.is_alive())
        extend(chain, given)

    monkeypatch.setattr(Chain, "extend", extend_and_look)
    found = memo.grow(None, text, marks(text), [300], [ids])
    made = memo.hashes(found, ids, PAGE)
    assert memo.hashes(found, ids, PAGE) == made == hashes(list(ids), PAGE)
    assert waited == [False, False], "one for the memo, one for what it is compared with"
    assert memo.hashes(found, ids + array("I", range(9)), PAGE) == hashes([*ids, *range(9)], PAGE)
    assert memo.faults() == []


def test_a_text_at_which_the_library_panics_has_no_tokens_and_ends_nobody() -> None:
    reference = Reference(folder(router_models.byte_level(r"(a|aa)+$")))
    hopeless = "a" * 60 + "b"
    with pytest.raises(ValueError, match=r"panicked: .*retry-limit"):
        reference.encode([hopeless])
    made = Encoder(reference, backend=reference)
    with pytest.raises(NoTokens, match="gave up at this text"):
        made.encode(hopeless)
    assert list(made.encode("b").ids) == list(reference.encode(["b"])[0])
    made.close()
