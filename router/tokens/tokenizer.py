"""Text to ids, whole texts at a time: the reference tokenizer, and a faster one where it gives the same ids.

`tokenizers` is what the worker's transformers uses: it is right by definition. `fastokens` is several times faster,
and used only where its ids equal the reference's on a self-test of varied text with this very tokenizer; otherwise,
and where it is not installed, the reference does all.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import tokenizers

from kvd.errors import SettingsError
from kvd.router.tokens.digits import by_added_tokens
from kvd.router.tokens.folder import ModelFolder
from kvd.router.tokens.selftest import varied


class Backend(Protocol):
    """Ids of texts, no special tokens added; `name` goes into reports. Raises ValueError where the library fails."""

    name: str

    def encode(self, texts: "Sequence[str]") -> "list[array[int]]": ...


class Reference:
    """Hugging Face tokenizers with the folder's tokenizer.json as transformers 5 loads it."""

    name = "tokenizers"

    def __init__(self, folder: ModelFolder) -> None:
        """Raises SettingsError for a tokenizer.json that cannot be read."""
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_str(folder.tokenizer)
        except Exception as error:  # tokenizers raises nothing more precise
            raise SettingsError(
                f"tokenizer.json cannot be read: {error}", "it may want a newer tokenizers package"
            ) from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._add_tokens(folder)
        if folder.remade is not None:
            folder.remade.remake(self.tokenizer, folder.special_tokens.get("unk_token"))
        self.bos = folder.special_tokens.get("bos_token")
        self.bos_id = None if self.bos is None else self.tokenizer.token_to_id(self.bos)
        if folder.begins_with_bos:
            self._begin_with_bos()

    def encode(self, texts: Sequence[str], specials: bool = False) -> "list[array[int]]":
        """With `specials`, what the tokenizer puts before and after a text that is no chat is there too."""
        with _no_panic():
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=specials)
        return [array("I", each.ids) for each in found]

    def surroundings(self) -> "tuple[array[int], array[int]] | None":
        """What stands before and after every text; None where that depends on the text."""
        texts = ("a", "b c", "")
        bare, whole = self.encode(texts), self.encode(texts, specials=True)
        at = (n for n in range(len(whole[0]) + 1) if whole[0][n : n + len(bare[0])] == bare[0])
        before = next(at, None)
        if before is None:
            return None
        pair = whole[0][:before], whole[0][before + len(bare[0]) :]
        return pair if all(w == pair[0] + b + pair[1] for b, w in zip(bare, whole, strict=True)) else None

    def added(self) -> list[str]:
        """What the added tokens are written as."""
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.content]

    def _add_tokens(self, folder: ModelFolder) -> None:
        """As transformers, in its order: ids follow. Tokens that tokenizer.json has get the flags told of them."""
        told = {token["content"]: _flags(token) for _, token in sorted(folder.added_tokens.items())}
        known = {*self.added(), *told}
        for content in (*folder.special_tokens.values(), *folder.more_special):
            if content not in known:
                told[content] = {"special": True, "normalized": False}
        self.tokenizer.add_tokens([tokenizers.AddedToken(content, **flags) for content, flags in told.items()])

    def _begin_with_bos(self) -> None:
        wanted = self.bos_id is not None
        single = f"{self.bos}:0 $A:0" if wanted else "$A:0"
        special = [(self.bos, self.bos_id)] if wanted else []
        self.tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, pair=f"{single} $B:1", special_tokens=special
        )


def _flags(told: Mapping[str, Any]) -> dict[str, bool]:
    """Of an added token, as tokenizer_config.json says."""
    flags = {name: bool(told.get(name)) for name in ("single_word", "lstrip", "rstrip", "special")}
    return flags | {"normalized": bool(told.get("normalized", not flags["special"]))}


class Fast:
    """fastokens on the same tokenizer. Raises ImportError or ValueError where it cannot have it."""

    name = "fastokens"

    def __init__(self, reference: Reference) -> None:
        import fastokens

        told = reference.tokenizer.to_str()
        told_for_ascii = by_added_tokens(told)
        try:
            self._any: Any = fastokens.Tokenizer.from_json_str(told).encode_batch_flat
            self._ascii: Any = self._any
            if told_for_ascii is not None:
                self._ascii = fastokens.Tokenizer.from_json_str(told_for_ascii).encode_batch_flat
        except Exception as error:  # whatever its parser raises: the reference is there
            raise ValueError(f"fastokens does not take this tokenizer: {error}") from error

    def encode(self, texts: Sequence[str]) -> "list[array[int]]":
        with _no_panic():
            return [self._one(text) for text in texts]

    def _one(self, text: str) -> "array[int]":
        # One by one: several at once are shared out among threads of the library's own, whose waking and spinning
        # cost more CPU than a text does.
        ids = array("I")
        ids.frombytes((self._ascii if text.isascii() else self._any)([text])[0])
        return ids


@contextmanager
def _no_panic() -> Iterator[None]:
    """A panic of Rust's is no Exception: nobody catches it, so it would end the process."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"panicked: {error}") from error


def fastest(reference: Reference) -> tuple[Backend, str]:
    """The backend to use, and why it is not the fast one ("" where it is). About a second of work, once a model."""
    try:
        fast = Fast(reference)
    except (ImportError, ValueError) as error:
        return reference, str(error)
    for text in varied(reference.added()):
        try:
            same = fast.encode([text]) == reference.encode([text])
        except Exception as error:
            return reference, f"fastokens failed on {text[:40]!r}: {error}"
        if not same:
            return reference, f"fastokens gives other ids for {text[:40]!r}"
    return fast, ""
