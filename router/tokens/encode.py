"""Text to ids with a memory: the encoder of one model, shared by all its requests.

`encode` does it where it is called. `plan` looks at what is known and says how many bytes are new; `finish` encodes
those. An event loop calls `encode_soon`: what takes about a millisecond is done at once, more in a thread of the
encoder's pool, where the tokenizer holds no lock of the interpreter's.
"""

import asyncio
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from kvd.router.tokens.blocks import Naming
from kvd.router.tokens.cuts import cut_tokens, cuts
from kvd.router.tokens.memo import Found, Memo, MemoStats, digests
from kvd.router.tokens.outcome import NoTokens, Why
from kvd.router.tokens.tokenizer import Backend, Reference, fastest

MEMO_BYTES: Final = 256 << 20
LEAST_CUT_BYTES: Final = 256  # a piece shorter than that costs more to remember than to encode
AT_ONCE_BYTES: Final = {"fastokens": 16 << 10, "tokenizers": 2 << 10}  # about a millisecond's


@dataclass(frozen=True, slots=True)
class Plan:
    """A text that is to be encoded: what is known of it, and where the rest is cut."""

    data: bytes
    ends: Sequence[int]
    marks: Sequence[int]
    found: Found | None

    @property
    def new_bytes(self) -> int:
        return len(self.data) - (self.ends[self.found.cuts - 1] if self.found else 0)


@dataclass(frozen=True, slots=True)
class Encoded:
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
        self._least = least_cut_bytes
        self._memo = Memo(memo_bytes)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokens")

    def encode(self, text: str) -> Encoded:
        """Ids of a text as it stands, without what a tokenizer puts around one."""
        return self.finish(self.plan(text))

    async def encode_soon(self, text: str) -> Encoded:
        """The same, without holding up the event loop for more than a few milliseconds."""
        plan = self.plan(text)
        if plan.new_bytes <= AT_ONCE_BYTES.get(self.backend.name, 0):
            return self.finish(plan)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.finish, plan)

    def plan(self, text: str) -> Plan:
        """Raises NoTokens for text that is no Unicode."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise NoTokens(Why.INVALID, f"a surrogate in the text at {error.start}") from error
        ends = cuts(data, self.cut_tokens, self._least) if self.cut_tokens else []
        marks = digests(data, ends)
        return Plan(data, ends, marks, self._memo.find(marks) if marks else None)

    def finish(self, plan: Plan) -> Encoded:
        known = plan.found.cuts if plan.found else 0
        bounds = [plan.ends[known - 1] if known else 0, *plan.ends[known:], len(plan.data)]
        *pieces, tail = self.backend.encode([plan.data[begin:end].decode() for begin, end in pairwise(bounds)])
        found = self._memo.grow(plan.found, zip(plan.marks[known:], pieces, strict=True))
        ids = found.ids() if found is not None else array("I")
        ids.extend(tail)
        return Encoded(ids, found)

    def surround(self, encoded: Encoded, text: str) -> Encoded:
        """With what the tokenizer puts before and after a text that is no chat."""
        if self.surroundings is None:
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
