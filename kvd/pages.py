"""What a page is called: page keys and namespaces. Pure.

A page key is SGLang's own: SHA-256 over the previous key's 32 bytes followed by the page's tokens as
little-endian uint32 (sglang 0.5.23, srt/mem_cache/utils.py). It names tokens, salt and adapter, and
nothing else: two models, dtypes or ranks produce the same key for the same prompt.

A namespace is what the key leaves out (`Identity`), digested to 16 bytes. Always true: things that
differ in any field of Identity never share a page; things equal in all of them always do. What the
model is *served as* is left out on purpose: a name is not an identity.

A shard is one rank's part of a page. Shards are not in the namespace: all shards of a page form one
group that becomes visible, and is evicted, as a whole.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

import msgspec

KEY_BYTES: Final = 32
NAMESPACE_BYTES: Final = 16
KEY_SCHEME: Final = "sglang-sha256-chain-1"
_SEED_TAG: Final = b"sglang-cache-namespace-v1"


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """Everything that decides whether bytes stored by one worker are right for another.

    Field order is part of the digest: append only, and change KEY_SCHEME's number if meaning changes.
    """

    weights: str  # fingerprint of the weights, see kvd.sidecar.weights
    pool: str  # "kv", or the side pool's name
    pool_class: str
    layout: str
    dtype: str  # of the tensors on the host, e.g. "torch.bfloat16"
    store_dtype: str  # what the KV dtype is stored as; fp8 is stored as uint8
    page_tokens: int
    page_bytes: int  # of one shard
    layers: tuple[int, int, int]  # count, first, last+1
    geometry: tuple[int, ...]  # head count and sizes, or MLA's lora rank and rope dim
    replicated: bool  # every rank holds the same bytes (MLA)
    shards: int  # how many ranks' parts make one page on this machine
    tp_slice: tuple[int, int] = (0, 1)  # first of those ranks, and how many the worker has on all machines
    pipeline: tuple[int, int] = (0, 1)  # rank, size
    key_scheme: str = KEY_SCHEME
    tenant: str = ""

    def namespace(self) -> bytes:
        """16 bytes naming this identity."""
        return hashlib.sha256(b"kvd-namespace-1" + msgspec.msgpack.encode(self)).digest()[:NAMESPACE_BYTES]


def seed(extra_key: str | None = None, cache_salt: str | None = None) -> bytes | None:
    """The chain's first parent for salted or adapter requests; None for plain ones."""
    return digest_of(_SEED_TAG, extra_key, cache_salt)


def digest_of(tag: bytes, extra_key: str | None, cache_salt: str | None) -> bytes | None:
    """SGLang's digest of a namespace under a tag; what is absent differs from what is empty. None where both are."""
    if extra_key is None and cache_salt is None:
        return None
    digest = hashlib.sha256(tag)
    for part in (extra_key, cache_salt):
        if part is None:
            digest.update(b"\x00")
        else:
            raw = part.encode()
            digest.update(b"\x01" + len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def chain(tokens: Sequence[int], page_tokens: int, parent: bytes | None = None) -> list[bytes]:
    """Page keys of every full page of `tokens`; a tail shorter than a page has no key."""
    whole = tokens[: len(tokens) // page_tokens * page_tokens]
    try:
        return chain_packed(struct.pack(f"<{len(whole)}I", *whole), page_tokens, parent)
    except struct.error:  # a token that needs more than 32 bits; one below zero fails again
        return _chain_wide(whole, page_tokens, parent)


def chain_packed(tokens: bytes | memoryview, page_tokens: int, parent: bytes | None = None) -> list[bytes]:
    """The same of tokens that lie as little-endian uint32 already."""
    keys: list[bytes] = []
    page_bytes = 4 * page_tokens
    for start in range(0, len(tokens) - page_bytes + 1, page_bytes):
        digest = hashlib.sha256(parent or b"")
        digest.update(tokens[start : start + page_bytes])
        parent = digest.digest()
        keys.append(parent)
    return keys


def _chain_wide(tokens: Sequence[int], page_tokens: int, parent: bytes | None) -> list[bytes]:
    """Pages with such a token are marked, and packed as uint64."""
    keys: list[bytes] = []
    for start in range(0, len(tokens), page_tokens):
        page = tokens[start : start + page_tokens]
        wide = max(page) >= 1 << 32
        body = struct.pack(f"<{page_tokens}{'Q' if wide else 'I'}", *page)
        parent = hashlib.sha256((parent or b"") + (b"\xff" if wide else b"") + body).digest()
        keys.append(parent)
    return keys
