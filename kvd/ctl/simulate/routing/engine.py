"""What a modelled worker's steps take: six coefficients. Pure.

    prefill_s = step_s + token_s * new tokens + pair_s * (new tokens x what each looks at)
    decode_s  = idle_s + sequence_s * requests + context_s * tokens in their contexts

The engine that is here is SGLang with Qwen3-32B in BF16 on four H100 SXM, fitted to AIConfigurator's twelve measured
runs of it (aiconfigurator-core 0.12.0, silicon_sample.csv, Apache-2.0; 1,024 to 4,096 tokens in, 128 or 512 out, 16 to
128 requests at once): played again by the modelled worker, mean TTFT and mean token interval are off by 5 % on
average, by 21 % at most. Prompts there are too short to tell `pair_s`: it is from the same package's estimate of a
prompt of 32,768 tokens, 1.40 s, which comes out as 1.34 s.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Engine:
    """One worker: its speed, and how many tokens its KV memory holds."""

    name: str
    step_s: float
    token_s: float
    pair_s: float
    idle_s: float
    sequence_s: float
    context_s: float
    kv_tokens: int
    chunk_tokens: int = 8192  # SGLang's own on GPUs of this size
    most_running: int = 256

    def prefill_s(self, tokens: int, pairs: float) -> float:
        return self.step_s + self.token_s * tokens + self.pair_s * pairs

    def decode_s(self, requests: int, context: float) -> float:
        return self.idle_s + self.sequence_s * requests + self.context_s * context


def pairs(done: int, tokens: int) -> float:
    """What `tokens` new tokens after `done` others look at."""
    return tokens * (done + tokens / 2)


ENGINES: Final = {
    engine.name: engine
    for engine in (
        Engine(
            "qwen3-32b-h100x4",
            step_s=0.013, token_s=32.2e-6, pair_s=5e-10, idle_s=8.4e-3, sequence_s=23e-6, context_s=29e-9,
            kv_tokens=800_000,  # 85 % of the memory less 66 GB of weights, at 256 KiB a token
        ),
    )
}  # fmt: skip
