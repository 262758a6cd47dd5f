"""SGLang's KV-cache events as bytes: every encoding of its releases read, the newest one written. Pure.

A message has three frames, `[topic][seq, 8 bytes big-endian][batch]`; older releases' replays have no topic. A batch
is a msgpack array `[time, events, rank or nil]` (older ones lack the rank). An event is

    {"type": "BlockStored", "block_hashes": [...], "parent_block_hash": h | nil, "token_ids": [...], "block_size": n,
     "lora_id": nil, "medium": "GPU", ...}                             SGLang 0.5.21 and later; other keys are ignored
    ["BlockStored", hashes, parent, token_ids, block_size, lora_id[, medium]]                              before that
    ["BlockStoredWithMetadata", ...the same..., medium, {more}]                                            0.5.18 - 20

and likewise BlockRemoved (hashes, medium) and AllBlocksCleared. Hash n+1's parent is hash n. No medium means GPU.

Tokens are neither looked at nor copied: they pass through as the bytes they came in, flat or in pairs (EAGLE). What
cannot be read, an event of an unknown type included, is a PeerError: whoever skips it no longer knows what is held.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from kvd.errors import UNDECODABLE, PeerError
from kvd.wire.stream import Head

GPU, CPU_PINNED = "GPU", "CPU_PINNED"
END: Final = b"\xff" * 8  # sequence number that ends a replay
NO_TOKENS: Final = msgspec.Raw(b"\x90")
MAX_BATCH_BYTES: Final = 64 << 20
_SEQ_BYTES: Final = 8
_ARRAY: Final = (0x90, 0x9F)  # first bytes of a msgpack array of up to 15
_MIN, _MAX = -(1 << 63), (1 << 63) - 1


class Event(msgspec.Struct, tag_field="type", omit_defaults=True, kw_only=True, gc=False):
    """Base of the three. `medium` is None only where the sender left it out, which means GPU."""

    kvd: Head | None = None  # in the first event of a batch on a node's stream, nowhere else


class Stored(Event, tag="BlockStored", gc=False):
    """`block_hashes` are held now, each the child of the one before, the first of `parent_block_hash`."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None
    medium: str | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    lora_name: str | None = None


class Removed(Event, tag="BlockRemoved", gc=False):
    block_hashes: list[int]
    medium: str | None = None


class Cleared(Event, tag="AllBlocksCleared", gc=False):
    """Nothing is held any more; on a node's stream with a medium: nothing of that medium."""

    medium: str | None = None


AnyEvent = Stored | Removed | Cleared


class Batch(msgspec.Struct, array_like=True, gc=False):
    """What one message carries."""

    time_s: float
    events: list[AnyEvent]
    rank: int | None = None


class _RawBatch(msgspec.Struct, array_like=True, gc=False):
    time_s: float
    events: list[msgspec.Raw]
    rank: int | None = None


class _OldStored(msgspec.Struct, array_like=True, tag="BlockStored"):
    hashes: list[int]
    parent: int | None
    tokens: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None


class _OldStoredMore(_OldStored, array_like=True, tag="BlockStoredWithMetadata"):
    more: dict[str, Any] = {}


class _OldRemoved(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    hashes: list[int]
    medium: str | None = None


class _OldCleared(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


_batch = msgspec.msgpack.Decoder(Batch).decode
_raw_batch = msgspec.msgpack.Decoder(_RawBatch).decode
_event = msgspec.msgpack.Decoder(AnyEvent).decode
_old_event = msgspec.msgpack.Decoder(_OldStored | _OldStoredMore | _OldRemoved | _OldCleared).decode
encode = msgspec.msgpack.Encoder().encode


def read_frames(frames: Sequence[bytes]) -> tuple[int, bytes] | None:
    """Sequence number and payload of a published or replayed message, with or without topic and empty delimiter.

    None for the message that ends a replay. Raises PeerError.
    """
    if not 2 <= len(frames) <= 4 or len(frames[-2]) != _SEQ_BYTES:
        raise PeerError(f"{len(frames)} frames, or no sequence number: not a KV event")
    if frames[-2] == END:
        return None
    return int.from_bytes(frames[-2]), frames[-1]


def seq_frame(seq: int) -> bytes:
    return seq.to_bytes(_SEQ_BYTES)


def decode(payload: bytes) -> Batch:
    """A batch of any release, hashes as signed 64-bit numbers. Its tokens point into `payload`. Raises PeerError."""
    if len(payload) > MAX_BATCH_BYTES:
        raise PeerError(f"a batch of {len(payload)} bytes")
    try:
        batch = _decode(payload)
    except UNDECODABLE as error:
        raise PeerError(
            f"not a batch of KV events: {error}", "is another program's publisher at this address?"
        ) from error
    for event in batch.events:
        if not isinstance(event, Cleared):
            event.block_hashes = _signed(event.block_hashes)
        if isinstance(event, Stored) and event.parent_block_hash is not None:
            (event.parent_block_hash,) = _signed([event.parent_block_hash])
    return batch


def _decode(payload: bytes) -> Batch:
    try:
        return _batch(payload)
    except msgspec.ValidationError:
        raw = _raw_batch(payload)
        return Batch(raw.time_s, [_any_event(event) for event in raw.events], raw.rank)


def _any_event(raw: msgspec.Raw) -> AnyEvent:
    if not _ARRAY[0] <= memoryview(raw)[0] <= _ARRAY[1]:
        event: AnyEvent = _event(raw)
        return event
    match _old_event(raw):
        case _OldStored(hashes, parent, tokens, block_size, lora_id, medium) as old:
            more = old.more if isinstance(old, _OldStoredMore) else {}
            known = {key: more[key] for key in ("cache_salt", "session_id", "lora_name") if key in more}
            if not all(value is None or isinstance(value, str) for value in known.values()):
                raise ValueError("metadata that is no text")
            return Stored(
                block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, block_size=block_size,
                lora_id=lora_id, medium=medium, **known,
            )  # fmt: skip
        case _OldRemoved(hashes, medium):
            return Removed(block_hashes=hashes, medium=medium)
        case _:
            return Cleared()


def _signed(hashes: list[int]) -> list[int]:
    """Some senders write the same 64 bits as an unsigned number."""
    if not hashes or (max(hashes) <= _MAX and min(hashes) >= _MIN):
        return hashes
    return [value - (1 << 64) if value > _MAX else value for value in hashes]
