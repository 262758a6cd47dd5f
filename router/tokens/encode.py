"""Text to ids with a memory: the encoder of one model, shared by all its requests.

`encode` does it where it is called. `plan` looks at what is known and says how many bytes are new; `finish` encodes
those. An event loop calls `encode_soon`: what takes about a millisecond is done at once, more in a thread of the
encoder's pool, where the tokenizer holds no lock of the interpreter's.
"""

import asyncio
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Final

import msgspec

from kvd.router.tokens.blocks import Naming
from kvd.router.tokens.cuts import cut_tokens, cuts
from kvd.router.tokens.memo import Found, Memo, MemoStats, marks
from kvd.router.tokens.outcome import NoTokens, Why
from kvd.router.tokens.tokenizer import Backend, Reference, fastest

MEMO_BYTES: Final = 256 << 20
LEAST_CUT_BYTES: Final = 256  # a piece shorter than that costs more to remember than to encode
AT_ONCE_BYTES: Final = {"fastokens": 16 << 10, "tokenizers": 2 << 10}  # about a millisecond's
WORTH_BYTES: Final = {"fastokens": 2 << 10}  # a shorter text costs more to remember than to encode


class Plan(msgspec.Struct, frozen=True, eq=False):
    """A text that is to be encoded, and its known beginning. `marks`: None where it is not worth remembering."""

    text: str
    data: bytes
    marks: list[int] | None
    found: Found | None

    @property
    def new_bytes(self) -> int:
        return len(self.data) - (self.found.end if self.found else 0)


class Encoded(msgspec.Struct, frozen=True, eq=False):
    """`ids` of a whole text, and the memo's part in them."""

    ids: "array[int]"
    found: Found | None = None


class Encoder:
    """One model's tokenizer with its memo. `note`: why the fast backend is not used; "" where it is."""

    def __init__(
        self, reference: Reference, template: str = "", memo_bytes: int = MEMO_BYTES,
        backend: Backend | None = None, least_cut_bytes: int = LEAST_CUT_BYTES,
    ) -> None:  # fmt: skip
        self.reference = reference
        self.backend, self.note = (backend, "") if backend is not None else fastest(reference)
        self.cut_tokens = cut_tokens(reference.tokenizer.to_str(), template)
        self.surroundings = reference.surroundings()
        self._least, self._worth = least_cut_bytes, WORTH_BYTES.get(self.backend.name, 0)
        self._at_once = AT_ONCE_BYTES.get(self.backend.name, 0)
        self._memo = Memo(memo_bytes)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokens")

    def encode(self, text: str) -> Encoded:
        """Ids of a text as it stands, without what a tokenizer puts around one."""
        return self.finish(self.plan(text))

    async def encode_soon(self, text: str) -> Encoded:
        """The same, without holding up the event loop for more than a few milliseconds."""
        plan = self.plan(text)
        if plan.new_bytes <= self._at_once:
            return self.finish(plan)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.finish, plan)

    def brief(self, text: str) -> bool:
        """Whether it is encoded at once, whatever is known of it."""
        return 4 * len(text) <= self._at_once  # a character is four bytes at most

    def plan(self, text: str) -> Plan:
        """Raises NoTokens for text that is no Unicode."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise NoTokens(Why.INVALID, f"a surrogate in the text at {error.start}") from error
        if not self.cut_tokens or len(data) < self._worth:
            return Plan(text, data, None, None)
        found = marks(data)
        return Plan(text, data, found, self._memo.find(data, found))

    def finish(self, plan: Plan) -> Encoded:
        if plan.marks is None:
            with _tried():
                return Encoded(self.backend.encode([plan.text])[0])
        begin = plan.found.end if plan.found is not None else 0
        ends = cuts(plan.data, self.cut_tokens, self._least, begin)
        bounds = [begin, *ends, len(plan.data)]
        with _tried():
            *pieces, tail = self.backend.encode([plan.data[begin:end].decode() for begin, end in pairwise(bounds)])
        found = self._memo.grow(plan.found, plan.data, plan.marks, ends, pieces)
        ids = found.ids() if found is not None else array("I")
        ids.extend(tail)
        return Encoded(ids, found)

    def surround(self, encoded: Encoded, text: str) -> Encoded:
        """With what the tokenizer puts before and after a text that is no chat."""
        if self.surroundings is None:
            with _tried():
                return Encoded(self.reference.encode([text], specials=True)[0])
        before, after = self.surroundings
        if not before and not after:
            return encoded
        return Encoded(before + encoded.ids + after)

    def hashes(self, encoded: Encoded, naming: Naming) -> list[int]:
        """Event hashes of the whole pages; what a text shares with earlier ones is not hashed again."""
        return self._memo.hashes(encoded.found, encoded.ids, naming)

    def stats(self) -> MemoStats:
        return self._memo.stats()

    def faults(self) -> list[str]:
        return self._memo.faults()

    def close(self) -> None:
        """Waits for what is being encoded; may be called twice."""
        self._pool.shutdown()


@contextmanager
def _tried() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # rules of splitting have limits: Qwen's, at millions of spaces in a row
        raise NoTokens(Why.UNSUPPORTED, f"the tokenizer gave up at this text: {error}") from error
