"""Traces of requests in Mooncake's format: JSON lines, plain or gzipped. Pure but for the file.

A line is one request: `timestamp` in milliseconds and `hash_ids`, the ids of its blocks from the first token on; for
what asks about workers also `input_length` and `output_length` in tokens. An id stands for the block and all before
it. Order is the file's: timestamps are coarse, and ties keep it.
"""

import gzip
import zlib
from collections.abc import Sequence
from math import log2
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

import msgspec

from kvd.errors import KvdError


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


def prompts(path: Path) -> list[Prompt]:
    """All requests of a trace that have a prompt and an answer, in the order of their times. Raises KvdError."""
    found = [
        Prompt(line.timestamp / 1000, line.hash_ids, line.input_length, line.output_length)
        for line in _lines(path, _Whole)
        if line.input_length > 0 and line.output_length > 0
    ]
    return sorted(found, key=lambda prompt: prompt.at)


def block_tokens(found: Sequence[Prompt]) -> int:
    """How many tokens an id stands for, to the nearest power of two: a trace does not say."""
    ratios = [prompt.tokens / len(prompt.blocks) for prompt in found if prompt.blocks]
    return 1 << round(log2(max(1.0, median(ratios))))


def _lines(path: Path, kind: type[L]) -> list[L]:
    decode = msgspec.json.Decoder(kind).decode
    requests: list[L] = []
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    requests.append(decode(line))
    except msgspec.MsgspecError as error:
        fields = ", ".join(kind.__struct_fields__)
        raise KvdError(f"{path}, line {number}: {error}", f"a request is {{{fields}}}, one a line") from error
    except (OSError, EOFError, zlib.error) as error:
        raise KvdError(f"cannot read {path}: {error}", "name a readable trace, plain or gzipped (.gz)") from error
    if not any(request.hash_ids for request in requests):
        raise KvdError(f"{path} has no blocks", "a request names its blocks in hash_ids")
    return requests
