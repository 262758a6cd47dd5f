"""What a worker says of itself in its /server_info, as far as a router needs it. Pure.

Nothing of the answer is relied upon: what is not of the shape that SGLang gives it raises PeerError.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from kvd import sglang_info
from kvd.errors import UNDECODABLE, PeerError
from kvd.router.rates import CHUNK_TOKENS
from kvd.router.tokens.blocks import Format, Scheme
from kvd.router.tokens.serving import Serving

MOST_ADAPTERS: Final = 4096
MOST_CHARACTERS: Final = 4096  # of a path or a name: they are searched, logged and shown
_MOST: Final = 1 << 48  # of anything counted: JSON has numbers that no float can be
_GIB: Final = 1 << 30
_NAMES: Final = ("model_path", "served_model_name", "tokenizer_path", "revision")
_HINT: Final = "is this an SGLang server, of release 0.5.3 or later?"
# Their trees are of pairs of tokens (sglang: speculative/spec_info.py is_eagle), and so are their block hashes.
_PAIRS: Final = frozenset({"EAGLE", "EAGLE3", "FROZEN_KV_MTP", "NEXTN"})


@dataclass(frozen=True, slots=True)
class Told:
    """One life of a worker, as it told it. `no_blocks`: why its blocks cannot be named here; "" where they can."""

    serving: Serving
    tokenizer_path: str = ""
    revision: str | None = None
    life: str = ""  # see kvd.sglang_info
    block_tokens: int = 1  # of one block of its events
    format: Format = "default"
    most_tokens: int = 0  # of its KV memory, of each data-parallel rank; 0: not said
    chunk_tokens: int = CHUNK_TOKENS
    token_bytes: int = 0  # of one token's KV, of all ranks together, as far as it is said
    no_blocks: str = ""

    @classmethod
    def of(cls, answer: bytes) -> "Told":
        """From the body of the answer. Raises PeerError."""
        try:
            info = msgspec.json.decode(answer)
            if not isinstance(info, dict) or not isinstance(info.get("model_path"), str):
                raise TypeError("it names no model")
            return cls._of(info)
        except (*UNDECODABLE, TypeError, AttributeError, KeyError) as error:
            raise PeerError(f"its /server_info is not understood: {error}", _HINT) from error

    @classmethod
    def _of(cls, info: Mapping[str, Any]) -> "Told":
        serving = Serving.of(info)
        if len(serving.adapters) > MOST_ADAPTERS:
            raise ValueError(f"{len(serving.adapters)} adapters")
        if any(len(str(info.get(name))) > MOST_CHARACTERS for name in _NAMES):
            raise ValueError(f"one of {', '.join(_NAMES)} has more than {MOST_CHARACTERS} characters")
        events = info.get("kv_events") or {}
        config = info.get("kv_events_config") or "{}"
        config = msgspec.json.decode(config) if isinstance(config, str) else config
        chunk = _positive(info.get("chunked_prefill_size"))
        told = cls(
            serving,
            str(info.get("tokenizer_path") or info["model_path"]),
            info["revision"] if isinstance(info.get("revision"), str) else None,
            sglang_info.life(info),
            _positive(events.get("block_size")) or _positive(info.get("page_size")) or 1,
            "dynamo" if config.get("format") == "dynamo" else "default",
            _positive(info.get("max_total_num_tokens")),
            chunk or CHUNK_TOKENS,
            _token_bytes(info),
        )
        return replace(told, no_blocks=_no_blocks(info, events))

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.block_tokens, self.format, self.serving.adapters)

    def names(self) -> set[str]:
        """What a request may call what it serves: its model, and each adapter of it, alone or after the model."""
        bases = {name for name in (self.serving.served_name, self.serving.model_path) if name}
        return bases | {f"{base}:{adapter}" for base in bases for adapter in self.serving.adapters}


def _no_blocks(info: Mapping[str, Any], events: Mapping[str, Any]) -> str:
    if str(info.get("speculative_algorithm") or "").upper() in _PAIRS:
        return f"--speculative-algorithm {info['speculative_algorithm']}: its blocks are of pairs of tokens"
    if info.get("disable_radix_cache"):
        return "--disable-radix-cache: it keeps no prefixes"
    if not events:
        return "it publishes no KV events: start it with --kv-events-config"
    return ""


def _positive(value: Any) -> int:
    """A whole number above 0, of a size that there is; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST else 0


def _token_bytes(info: Mapping[str, Any]) -> int:
    """What its ranks' KV memory takes, by the tokens in it. Too much where ranks hold the same bytes (MLA)."""
    states = info.get("internal_states")
    memory = states[0].get("memory_usage") if isinstance(states, list) and states else None
    if not isinstance(memory, Mapping) or not isinstance(size := memory.get("kvcache"), int | float):
        return 0
    if not 0 <= size < _MOST:
        return 0
    tokens = _positive(memory.get("token_capacity")) or _positive(info.get("max_total_num_tokens"))
    ranks = max(1, _positive(info.get("tp_size"))) * max(1, _positive(info.get("pp_size")))
    groups = max(1, _positive(info.get("dp_size"))) if info.get("enable_dp_attention") else 1
    return round(size * _GIB / tokens * max(1, ranks // groups)) if tokens else 0
