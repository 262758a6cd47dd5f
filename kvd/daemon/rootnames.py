"""Whether a publisher names its blocks as we do: a release that hashes otherwise would never be matched. Pure.

The name of a prompt's first block follows from its tokens alone, where the event says neither salt nor adapter: some
are computed once more (kvd.pages). One that is right settles it; `_ENOUGH` wrong ones before it make the publisher
a stranger, whose blocks nobody can find by tokens. What cannot be told settles nothing.
"""

import struct
from collections.abc import Sequence
from typing import Final

import msgspec

from kvd.errors import UNDECODABLE
from kvd.pages import chain
from kvd.sglang_events import AnyEvent, Stored

_ENOUGH: Final = 8
_MOST_BYTES: Final = 1 << 20  # of an event's tokens: more are not decoded for this
_tokens = msgspec.msgpack.Decoder(list[int]).decode


class RootNames:
    """Of one life of a publisher."""

    def __init__(self) -> None:
        self._right = False
        self._wrong = 0

    @property
    def strange(self) -> bool:
        return self._wrong >= _ENOUGH

    def look(self, events: Sequence[AnyEvent]) -> None:
        """What it published, in order. Costs nothing once it is settled."""
        for event in events:
            if self._right or self.strange:
                return
            if isinstance(event, Stored) and event.parent_block_hash is None and (right := _right(event)) is not None:
                self._right = right
                self._wrong += not right


def _right(event: Stored) -> bool | None:
    """None: it cannot be told."""
    if not event.block_hashes or (event.cache_salt, event.lora_name, event.lora_id) != (None, None, None):
        return None
    size = event.block_size
    if size < 1 or len(memoryview(event.token_ids)) > _MOST_BYTES:
        return None
    try:
        keys = chain(_tokens(event.token_ids)[:size], size)
    except (*UNDECODABLE, struct.error):
        return None
    return int.from_bytes(keys[0][:8], signed=True) == event.block_hashes[0] if keys else None
