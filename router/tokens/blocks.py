"""From token ids to the block hashes of SGLang 0.5.23's KV events. Pure.

A block is a page: its key is the page key of kvd.pages, chained from a seed, and its event hash the first 8 bytes of
that key as a signed integer. What the seed and the hash name besides the tokens differs by event format:

    format   chain starts from                              each hash is then
    default  the cache_salt's digest; extra_key is ignored  for LoRA requests, hashed with (extra_key + adapter id)
    dynamo   the same                                       hashed with (extra_key + adapter id, cache_salt), if any

    tiers    salt and extra_key + adapter id, which seed the  is the key's first 8 bytes: a plain prompt's pages have
             chain of page keys (kvd.pages.seed)              the same hashes everywhere

Only whole pages have a hash. Always true: the chain of a prompt begins with the chain of each of its prefixes.
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from kvd.pages import KEY_BYTES, chain, chain_packed, digest_of, seed
from kvd.router.tokens.outcome import Namespace, NoTokens, Why

Format = Literal["default", "dynamo"]
_FIRST: Final = struct.Struct(f">q{KEY_BYTES - 8}x")  # of a key
_SALT_TAG: Final = b"sglang-cache-salt-v1\0"
_EVENT_TAG: Final = b"sglang-kv-event-namespace-v1"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one worker names its blocks: what its /server_info says of its events, and its adapters' ids by name."""

    page_tokens: int
    format: Format = "default"
    adapters: Mapping[str, str] = field(default_factory=dict)

    def names(self, namespace: Namespace) -> "Naming":
        """In events. Raises NoTokens for an adapter whose id is not known: a worker draws it when it loads one."""
        if namespace.plain:
            return Naming(self.page_tokens)
        salt, extra_key = namespace.cache_salt, self._extra_key(namespace)
        parent = None if salt is None else hashlib.sha256(_SALT_TAG + salt.encode()).digest()
        if self.format == "dynamo":
            return Naming(self.page_tokens, parent, digest_of(_EVENT_TAG, extra_key, salt))
        return Naming(self.page_tokens, parent, digest_of(_EVENT_TAG, extra_key if namespace.adapter else None, None))

    def stores(self, namespace: Namespace) -> "Naming":
        """In tiers below the workers, by the first 8 bytes of the pages' keys. Raises NoTokens likewise."""
        return Naming(self.page_tokens, seed(self._extra_key(namespace), namespace.cache_salt))

    def _extra_key(self, namespace: Namespace) -> str | None:
        """With the adapter's id, as the engine has it."""
        if namespace.adapter is None:
            return namespace.extra_key
        known = self.adapters.get(namespace.adapter)
        if known is None:
            raise NoTokens(Why.ADAPTER, f"the id of LoRA adapter {namespace.adapter!r} is not known")
        return (namespace.extra_key or "") + known


class Naming(msgspec.Struct, frozen=True):
    """One namespace under one scheme. `parent` starts the chain; `seed` hashes each event hash again."""

    page_tokens: int
    parent: bytes | None = None
    seed: bytes | None = None

    def hashes(self, keys: Sequence[bytes]) -> list[int]:
        """The signed 64-bit event hashes of page keys."""
        if self.seed is not None:
            keys = [hashlib.sha256(self.seed + key[:8]).digest() for key in keys]
        return [hash for (hash,) in _FIRST.iter_unpack(b"".join(keys))]


class Chain:
    """Event hashes of a sequence of tokens that only grows: extended by what is new, never computed again.

    32 bytes of key and one int a block.
    """

    __slots__ = ("_keys", "hashes", "naming")

    def __init__(self, naming: Naming) -> None:
        self.naming = naming
        self.hashes: list[int] = []
        self._keys = bytearray()

    def extend(self, ids: Sequence[int]) -> None:
        """`ids` is the whole sequence, from the first token; what was given before must not have changed."""
        done, page = len(self.hashes), self.naming.page_tokens
        if len(ids) < (done + 1) * page:
            return
        keys = _keys(ids[done * page :], page, self._parent())
        self._keys += b"".join(keys)
        self.hashes += self.naming.hashes(keys)

    def fork(self, blocks: int) -> "Chain":
        """A chain of its own that begins with the first `blocks` blocks of this one."""
        fork = Chain(self.naming)
        fork.hashes = self.hashes[:blocks]
        fork._keys = self._keys[: len(fork.hashes) * KEY_BYTES]
        return fork

    def _parent(self) -> bytes | None:
        return bytes(self._keys[-KEY_BYTES:]) if self._keys else self.naming.parent


def _keys(ids: Sequence[int], page_tokens: int, parent: bytes | None) -> list[bytes]:
    """An array of uint32 lies in memory as its page keys want it."""
    if isinstance(ids, array) and ids.typecode == "I" and sys.byteorder == "little":
        return chain_packed(memoryview(ids).cast("B"), page_tokens, parent)
    return chain(ids, page_tokens, parent)


def hashes(ids: Sequence[int], naming: Naming) -> list[int]:
    """Event hashes of every whole page of `ids`."""
    found = Chain(naming)
    found.extend(ids)
    return found.hashes
