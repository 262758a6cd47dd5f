"""What a worker may call a namespace: anything else would end the daemon later, or fill its memory."""

from typing import Any

import msgspec
import pytest

from kvd import wire
from kvd.daemon.requests import valid_namespace
from kvd.errors import PeerError, Refused

SPEC = wire.NamespaceSpec(bytes(range(16)), 65536, 4, 0, 1, "kv", "test")
EXTENT_BYTES = 4 << 20


@pytest.mark.parametrize(
    "more",
    [
        {"page_tokens": (1 << 64) - 1}, {"page_tokens": 0}, {"page_bytes": 0}, {"digest": b"short"},
        {"shard": 1}, {"shards": 0}, {"label": "l" * 257}, {"tenant": "t" * 257}, {"pool": "p" * 65},
        {"family": b"short"},
    ],
)  # fmt: skip
def test_what_no_plugin_says_is_refused(more: dict[str, Any]) -> None:
    valid_namespace(SPEC, EXTENT_BYTES)
    with pytest.raises(PeerError):
        valid_namespace(msgspec.structs.replace(SPEC, **more), EXTENT_BYTES)


def test_a_page_that_fits_no_extent_is_refused_with_the_remedy() -> None:
    with pytest.raises(Refused, match="does not fit an extent"):
        valid_namespace(msgspec.structs.replace(SPEC, page_bytes=2 * EXTENT_BYTES), EXTENT_BYTES)
