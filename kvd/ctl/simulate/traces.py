"""Traces of requests in Mooncake's format: JSON lines, plain or gzipped. Pure but for the file.

A line is one request: `timestamp` in milliseconds and `hash_ids`, the ids of its blocks from the first token on. An id
stands for the block and all before it. Order is the file's: timestamps are coarse, and ties keep it.
"""

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvd.errors import KvdError


class Request(NamedTuple):
    """What one request asks of a cache."""

    at: float  # seconds
    blocks: list[int]


class _Line(msgspec.Struct):
    timestamp: float
    hash_ids: list[int]


def read(path: Path) -> list[Request]:
    """All requests of a trace. Raises KvdError."""
    decode = msgspec.json.Decoder(_Line).decode
    requests: list[Request] = []
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    found = decode(line)
                    requests.append(Request(found.timestamp / 1000, found.hash_ids))
    except msgspec.MsgspecError as error:
        raise KvdError(f"{path}, line {number}: {error}", "a request is {timestamp, hash_ids}, one a line") from error
    except (OSError, EOFError, zlib.error) as error:
        raise KvdError(f"cannot read {path}: {error}", "name a readable trace, plain or gzipped (.gz)") from error
    if not any(request.blocks for request in requests):
        raise KvdError(f"{path} has no blocks", "a request names its blocks in hash_ids")
    return requests
