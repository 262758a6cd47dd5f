"""Where a text may be cut so that its pieces' ids, one after the other, are the whole text's ids. Pure.

A Hugging Face tokenizer first takes a text apart at its added tokens; what lies between two of them is normalised and
encoded by itself. So behind an added token a text may be cut, provided that

- nothing else can match there instead: no other added token contains it, or begins before it and ends inside it,
  or it inside itself;
- it is matched as it stands (not normalised), and takes no spaces around it along (lstrip, rstrip);
- no added token asks what stands beside it (single_word);
- the pre-tokenizer does not ask where in the sequence a piece lies (as Metaspace with "first" does).

Where any of this does not hold for a tokenizer, it has no cuts.
"""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

# Each acts on a piece alone, wherever it lies.
_LOCAL: Final = frozenset(
    {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer",
     "CharDelimiterSplit", "UnicodeScripts"}
)  # fmt: skip
MOST_TOKENS: Final = 8  # each is searched for in every text
FAVOURED: Final = ("end", "eot", "eos", "</s>", "start", "user", "assistant")


def cut_tokens(tokenizer_json: str, template: str = "") -> list[bytes]:
    """Added tokens of this tokenizer behind which every text may be cut, those first that the template writes."""
    told = json.loads(tokenizer_json)
    if not _local(told.get("pre_tokenizer")) or (told.get("model") or {}).get("dropout"):
        return []
    added = told.get("added_tokens") or []
    if any(token["single_word"] for token in added):
        return []
    contents = [token["content"] for token in added if token["content"]]
    changed = ("normalized", "lstrip", "rstrip")
    plain = [token["content"] for token in added if token["content"] and not any(token[name] for name in changed)]
    written = [content for content in plain if content in template]
    return _fit(written, contents) or _fit(sorted(plain, key=_unlikely), contents)


def cuts(data: bytes, tokens: Sequence[bytes], least: int, at: int = 0) -> list[int]:
    """Ascending offsets behind such tokens, each at least `least` bytes behind the one before, none at the very end.

    `at`: one of them that is known, to go on from; 0 for all.

    The cuts of a text that goes on begin with the cuts of the text: a memo by prefix depends on that.
    """
    found: list[int] = []
    ahead = [-1] * len(tokens)  # where each token is found next
    while True:
        first = -1
        for which, token in enumerate(tokens):
            begin = max(at + least - len(token), at)
            if ahead[which] < begin:
                where = data.find(token, begin)
                ahead[which] = len(data) if where < 0 else where
            end = ahead[which] + len(token)
            if first < 0 or end < first:
                first = end
        if first < 0 or first >= len(data):
            return found
        found.append(first)
        at = first


def _fit(wanted: Sequence[str], contents: Sequence[str]) -> list[bytes]:
    """The first few that nothing else can match in place of. No more are looked at: some models have thousands."""
    return [content.encode() for content in islice((one for one in wanted if _alone(one, contents)), MOST_TOKENS)]


def _alone(content: str, contents: Sequence[str]) -> bool:
    heads = tuple(content[:end] for end in range(1, len(content) + 1))
    if content.endswith(heads[:-1]):
        return False
    return not any(other != content and (content in other or other[1:].endswith(heads)) for other in contents)


def _unlikely(content: str) -> int:
    return next((rank for rank, word in enumerate(FAVOURED) if word in content), len(FAVOURED))


def _local(pre_tokenizer: Any) -> bool:
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(_local(each) for each in pre_tokenizer["pretokenizers"])
    return pre_tokenizer["type"] in _LOCAL
