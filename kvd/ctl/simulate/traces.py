"""Traces of requests in Mooncake's format: JSON lines, plain or gzipped. Pure but for the file.

A line is one request: `timestamp` in milliseconds and `hash_ids`, the ids of its blocks from the first token on; for
what asks about workers also `input_length` and `output_length` in tokens. An id stands for the block and all before
it. Order is the file's: timestamps are coarse, and ties keep it.
"""

import gzip
import zlib
from collections.abc import Callable, Sequence
from math import log2
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple, TypeVar

import msgspec

from kvd.errors import UNDECODABLE, KvdError

_BEYOND: Final = 1 << 63


class Request(NamedTuple):
    """What one request asks of a cache."""

    at: float  # seconds
    blocks: list[int]


class Prompt(NamedTuple):
    """What one request asks of a worker."""

    at: float  # seconds
    blocks: list[int]
    tokens: int  # of the prompt
    output: int  # tokens


class _Line(msgspec.Struct):
    timestamp: float
    hash_ids: list[int]


class _Whole(_Line):
    input_length: int
    output_length: int


L = TypeVar("L", bound=_Line)


def read(path: Path) -> list[Request]:
    """All requests of a trace, as a cache sees them. Raises KvdError."""
    return [Request(line.timestamp / 1000, line.hash_ids) for line in _lines(path, _Line)]


def prompts(path: Path, most: int | None = None) -> list[Prompt]:
    """The requests of a trace that have a prompt and an answer, in the order of their times: all, or the first `most`.
    At least one has blocks, and an id comes after the same one wherever it is. Raises KvdError."""
    found = [
        Prompt(line.timestamp / 1000, line.hash_ids, line.input_length, line.output_length)
        for line in _lines(path, _Whole, _Chained().wrong)
        if line.input_length > 0 and line.output_length > 0
    ]
    found = sorted(found, key=lambda prompt: prompt.at)[:most]
    if not any(prompt.blocks for prompt in found):
        which = "no request" if most is None else f"none of the first {most:,} requests"
        raise KvdError(
            f"{path}: {which} has blocks, a prompt and an answer",
            "name blocks in hash_ids, with an input_length and an output_length above 0",
        )
    return found


def block_tokens(found: Sequence[Prompt]) -> int:
    """How many tokens an id stands for, to the nearest power of two: a trace does not say. At least one has blocks."""
    ratios = [prompt.tokens / len(prompt.blocks) for prompt in found if prompt.blocks]
    return 1 << round(log2(max(1.0, median(ratios))))


class _Chained:
    """What the router's index, which the fleet uses, takes ids for: prefixes, as signed integers of 64 bits."""

    def __init__(self) -> None:
        self._before: dict[int, int | None] = {}

    def wrong(self, line: _Line) -> str:
        """Why this line contradicts itself or those before it; empty where it does not."""
        before: int | None = None
        for block in line.hash_ids:
            if not -_BEYOND <= block < _BEYOND:
                return f"block {block} is no signed integer of 64 bits"
            if self._before.setdefault(block, before) != before:
                if line.hash_ids.count(block) > 1:
                    return f"block {block} is there twice"
                return f"block {block} had another one, or none, before it in an earlier line"
            before = block
        return ""


def _lines(path: Path, kind: type[L], wrong: Callable[[L], str] = lambda _: "") -> list[L]:
    """`wrong`: what is wrong with a line that has all fields; empty: nothing."""
    decode = msgspec.json.Decoder(kind).decode
    requests: list[L] = []
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    requests.append(decode(line))
                    if said := wrong(requests[-1]):
                        hint = "an id stands for a block and all before it: the same id, the same prompt up to there"
                        raise KvdError(f"{path}, line {number}: {said}", hint)
    except UNDECODABLE as error:
        fields = ", ".join(kind.__struct_fields__)
        raise KvdError(f"{path}, line {number}: {error}", f"a request is {{{fields}}}, one a line") from error
    except (OSError, EOFError, zlib.error) as error:
        raise KvdError(f"cannot read {path}: {error}", "name a readable trace, plain or gzipped (.gz)") from error
    if not any(request.hash_ids for request in requests):
        raise KvdError(f"{path} has no blocks", "a request names its blocks in hash_ids")
    return requests
