"""Texts of the kinds that tokenizers disagree on, and random mixtures of them; the same on every start."""

import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Final

SEED: Final = 23
_PIECES: Final = (
    "The quick brown fox", " jumps", "  over\n\n\n", "\t\tthe lazy\r\n dog",
    "12345678901 3.14e-10 \xbd \u0663\u0664", "don't WE'LL they'RE",
    "na\xefve fa\xe7ade Stra\xdfe \u0130stanbul \u01c5 \u1e9e", "\u0130\u0307",
    "e\u0301\u0323 \u1e9b\u0323 \ufb01 \u2460", "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u3053\u3093 \u30ab\u30bf",
    "\uc548\ub155 \u1100\u1161", "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u05e9\u05dc\u05d5\u05dd \u0639\u0644\u064a", "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f", "\U0001f1e9\U0001f1ea",
    "\u200b\xa0\u3000\u2028\ufeff", "\x00\x01\x7f", "\U0001f600\U000e0067", "\U0001d518\U0001d52b",
    "def f(x):\n    return {'a': [1, 2]}  # ok\n", '{"name": "x", "arguments": {"q": "\\u00e9\\n"}}', "_-+*/|",
    '<div class="a">&amp;</div>', "https://example.org/a?b=c&d=%20#e", "a" * 70, "=" * 40, " " * 33, "\n" * 17,
    "SELECT * FROM t WHERE a<>b;", "<|im_start|", "</s", "[INST] [/INST]", "<|x|><y>[Z]",
)  # fmt: skip
_RANGES: Final = (
    (0x20, 0x250), (0x300, 0x370), (0x400, 0x460), (0x5D0, 0x600), (0x900, 0x980), (0x2000, 0x2070), (0x3040, 0x30A0),
    (0x4E00, 0x4E80), (0xAC00, 0xAC80), (0x1F300, 0x1F380),
)  # fmt: skip
_POINTS: Final = [point for begin, end in _RANGES for point in range(begin, end)]


def varied(added: Sequence[str]) -> Iterator[str]:
    """About 250 texts; `added` are the tokenizer's added tokens, in its order."""
    draw = Random(SEED)
    some = [*added[:16], *draw.sample(added, min(16, len(added)))]
    yield from ("", " ", *_PIECES, *some)
    yield from (f"{token} x{token}\n{token}{token}y" for token in some)
    yield json.dumps(_PIECES)
    for length in (3, 3, 3, 3, 5, 5, 5, 5, 8, 8, 8, 13, 21, 34, 55, 89, 144):
        yield from ("".join(draw.choices((*_PIECES, *some), k=length)) for _ in range(6))
    yield from ("".join(map(chr, draw.choices(_POINTS, k=draw.randint(1, 60)))) for _ in range(60))
