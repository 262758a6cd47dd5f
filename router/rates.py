"""How fast one worker is: prefill and decode, learnt from what it did, and its node's tiers, as the node says. Pure.

    prefill  step_s * prompts + token_s * new tokens + pair_s * (new tokens x what each looks at)
    decode   step_s + request_s * running + context_s * tokens in their contexts: seconds between a request's tokens
    load     latency_s + bytes / bytes_per_s, per tier

and how long answers are.

The priors are a 30-billion model's on four H100: right in shape for any dense transformer on any machine, and only the
shape lasts beyond the first observations. A worker is taken to be as fast as its kind (kvd.router.regression): one
that computed its first long prompt looked fast, and got everything, while the others were known to be slow.
"""

from typing import Final

from kvd.router.regression import Regression
from kvd.router.work import Work

PREFILL: Final = (0.01, 3e-5, 5e-10)
CHUNK_TOKENS: Final = 8192
ANSWER_TOKENS: Final = 256.0
_ANSWERS: Final = 128  # that count for the mean
DECODE: Final = (0.01, 2e-5, 3e-8)
LOAD: Final = {"ram": (0.001, 10e9), "nvme": (0.005, 2e9), "shared": (0.02, 1e9)}  # until a node has measured it


class Rates:
    """Seconds for what a worker may have to do. `token_bytes`: of one token's KV, all ranks together;
    `chunk_tokens`: that a prefill step takes at most, the worker's `chunked_prefill_size`."""

    def __init__(self, token_bytes: int = 0, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.token_bytes = token_bytes
        self.chunk_tokens = chunk_tokens
        self.prefill = Regression(PREFILL)
        self.decode = Regression(DECODE)
        self._answer_tokens = ANSWER_TOKENS
        self._answers = 0
        self.kind: Rates | None = None
        self._loads = dict(LOAD)

    def follow(self, kind: "Rates") -> None:
        """This worker is one of this kind, which is told all that is observed of it.

        What it did as one of another kind is forgotten.
        """
        if self.kind is kind:
            return
        if self.kind is not None:
            self.prefill, self.decode, self._answers = Regression(PREFILL), Regression(DECODE), 0
        self.kind = kind
        self.prefill.like, self.decode.like = kind.prefill, kind.decode

    @property
    def answer_tokens(self) -> float:
        """Of a mean answer."""
        return self._answer_tokens if self._answers or self.kind is None else self.kind.answer_tokens

    def prefill_s(self, work: Work) -> float:
        prompt_s, token_s, pair_s = self.prefill.coefficients
        return prompt_s * work.prompts + token_s * work.tokens + pair_s * work.pairs

    def prompt_s(self, tokens: int, cached: int) -> float:
        """`prefill_s` of one prompt, `cached` tokens of which need not be computed."""
        prompt_s, token_s, pair_s = self.prefill.coefficients
        if cached >= tokens:
            cached = tokens - 1
        new = tokens - cached
        return prompt_s + token_s * new + pair_s * (new * (cached + new / 2))

    def interval_s(self, running: int, context_tokens: float) -> float:
        """Between two tokens of a request, `running` of them at once."""
        step_s, request_s, context_s = self.decode.coefficients
        return step_s + request_s * running + context_s * context_tokens

    def load_s(self, tier: str, tokens: int) -> float:
        """Until so many tokens' KV are there, from "ram", "nvme" or "shared"."""
        if tokens <= 0:
            return 0.0
        latency_s, bytes_per_s = self._loads[tier]
        return latency_s + tokens * self.token_bytes / bytes_per_s

    def learn(self) -> None:
        """Make something of what was observed: about once a second, and of its kind before."""
        self.prefill.learn()
        self.decode.learn()

    def prefilled(self, work: Work, seconds: float) -> None:
        """So much was computed in so long, by a worker that had nothing else to do."""
        self.prefill.observe(work, seconds)

    def decoded(self, running: int, context_tokens: float, seconds: float) -> None:
        """So long between two tokens."""
        self.decode.observe((1.0, running, context_tokens), seconds)

    def answered(self, tokens: int) -> None:
        """An answer was so long."""
        if self.kind is not None:
            self.kind.answered(tokens)
        self._answers = min(_ANSWERS, self._answers + 1)
        self._answer_tokens += (max(1, tokens) - self._answer_tokens) / self._answers

    def told(self, tier: str, latency_s: float, bytes_per_s: float) -> None:
        """A tier of its node is so fast."""
        self._loads[tier] = (latency_s, bytes_per_s)
