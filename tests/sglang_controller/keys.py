"""Page keys: the SHA-256 chain SGLang builds over a request's tokens.

    digest_i = SHA256(digest_{i-1} || tokens of page i, each 4 bytes little-endian);  key_i = hex(digest_i)

Only 0.5.23 seeds the chain with the request's namespace (extra_key, cache_salt). 0.5.5 and 0.5.10 hash the
bare tokens, so there two LoRA adapters share keys. A partial last page has no key.
"""

import hashlib
from collections.abc import Sequence

Token = int | tuple[int, int]

_NAMESPACE_TAG = b"sglang-cache-namespace-v1"
_U32_MAX = 2**32 - 1


def namespace_seed(extra_key: str | None = None, cache_salt: str | None = None) -> str | None:
    """The digest a salted chain starts from in 0.5.23; None when the request has neither part."""
    if extra_key is None and cache_salt is None:
        return None
    digest = hashlib.sha256(_NAMESPACE_TAG)
    for part in (extra_key, cache_salt):
        if part is None:
            digest.update(b"\x00")
        else:
            text = part.encode()
            digest.update(b"\x01" + len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def page_key(tokens: Sequence[Token], prior: str | None = None) -> str:
    """The key of one page, chained to `prior`; a bigram token (EAGLE) is hashed as its two ids."""
    flat = [part for token in tokens for part in (token if isinstance(token, tuple) else (token,))]
    digest = hashlib.sha256(bytes.fromhex(prior) if prior else b"")
    if max(flat, default=0) > _U32_MAX:
        digest.update(b"\xff" + b"".join(value.to_bytes(8, "little") for value in flat))
    else:
        digest.update(b"".join(value.to_bytes(4, "little") for value in flat))
    return digest.hexdigest()


def page_keys(
    tokens: Sequence[Token],
    page_size: int,
    *,
    prior: str | None = None,
    extra_key: str | None = None,
    cache_salt: str | None = None,
) -> list[str]:
    """Keys of every full page. `prior` is the key of the page before; the salt only seeds a chain's start."""
    last = prior if prior is not None else namespace_seed(extra_key, cache_salt)
    keys: list[str] = []
    for start in range(0, len(tokens) - len(tokens) % page_size, page_size):
        last = page_key(tokens[start : start + page_size], last)
        keys.append(last)
    return keys


def event_hash(key: str) -> int:
    """The signed 64-bit block hash that KV events carry for an unsalted page key."""
    value = int(key[:16], 16)
    return value - 2**64 if value >= 2**63 else value
