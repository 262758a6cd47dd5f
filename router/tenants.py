"""Who asks: API keys, and what follows from them. Pure.

Only digests of keys are kept. A key is looked up by comparing its digest with every known one in constant time, so how
long that takes says nothing about how much of a guess was right.

Two tenants never share cached pages: each request carries `cache_salt`, derived here from a secret and the tenant's
name, so nobody can name another's. SGLang keys its cache by it (radix tree, HiCache, events).
"""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kvd.errors import UNDECODABLE, KvdError, SettingsError

SALT_FIELD = "cache_salt"
_MIN_KEY_BYTES = 16
# Whom a worker fetches cached pages from.
_OURS = frozenset({"bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"})
_decode = msgspec.json.Decoder().decode


class Unsaltable(KvdError):
    """A request whose cached pages could not be kept apart from other tenants'."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """`weight`: its share of the queue. `admin`: may use every endpoint. `shared`: no salt, pages in common."""

    name: str
    weight: float = 1.0
    priority: int = 0
    admin: bool = False
    shared: bool = False


ANYBODY = Tenant("", admin=True, shared=True)


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tenant in the file of keys: `[NAME]` with `sha256 = ["..."]`, digests in hexadecimal."""

    sha256: list[str]
    weight: float = 1.0
    priority: int = 0
    admin: bool = False
    shared: bool = False


_FIELDS: Final = (
    'a tenant is [NAME] with sha256 = ["..."], and where wanted weight = 1.0, priority = 0, '
    "admin = true, shared = true: docs/router.md has an example"
)


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


_NO_KEY: Final = digest(b"")


class Tenants:
    """Every tenant, by the digests of its keys. Without any, everybody is ANYBODY."""

    def __init__(self, by_digest: Sequence[tuple[bytes, Tenant]], secret: bytes) -> None:
        self._known = list(by_digest)
        self._secret = secret

    @classmethod
    def read(cls, sections: Mapping[str, Any], secret: bytes) -> "Tenants":
        """From a parsed TOML file. Raises SettingsError naming the tenant."""
        known: list[tuple[bytes, Tenant]] = []
        for name, section in sections.items():
            try:
                entry = msgspec.convert(section, KeyFile)
            except msgspec.ValidationError as error:
                raise SettingsError(f"keys of tenant {name}: {error}", _FIELDS) from error
            try:
                digests = [bytes.fromhex(text) for text in entry.sha256]
            except ValueError as error:
                raise SettingsError(f"keys of tenant {name}: {error}", "see kvd-router --hash-key") from error
            if any(len(one) != hashlib.sha256().digest_size for one in digests) or not digests:
                raise SettingsError(f"keys of tenant {name}: sha256 needs 64 digits each", "see kvd-router --hash-key")
            if _NO_KEY in digests:
                raise SettingsError(
                    f"keys of tenant {name}: a digest is that of an empty key, which everybody has",
                    "make one of a real key with kvd-router --hash-key",
                )
            if not 0 < entry.weight < float("inf"):
                raise SettingsError(f"keys of tenant {name}: weight must be above 0", "1.0 is everybody's")
            tenant = Tenant(name, entry.weight, entry.priority, entry.admin, entry.shared)
            known += [(one, tenant) for one in digests]
        if len({one for one, _ in known}) < len(known):
            raise SettingsError("a key belongs to two tenants", "give each tenant keys of its own")
        if any(not tenant.shared for _, tenant in known) and len(secret) < _MIN_KEY_BYTES:
            raise SettingsError(
                f"tenants.secret_file holds {len(secret)} bytes, of the {_MIN_KEY_BYTES} that keep tenants apart"
                if secret
                else f"tenants are kept apart by a secret of at least {_MIN_KEY_BYTES} bytes",
                "set tenants.secret_file (openssl rand -hex 32 makes what is in it), or shared = true for each tenant",
            )
        return cls(known, secret)

    @property
    def needed(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._known)

    def who(self, single: Mapping[bytes, bytes]) -> Tenant | None:
        """Whose request this is, by `authorization: Bearer KEY` or `x-api-key: KEY`; None for a stranger's."""
        if not self._known:
            return ANYBODY
        kind, _, key = single.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            key = single.get(b"x-api-key", b"")
        if not (key := key.strip()):  # no secret to guess at, and never anybody's, whatever digests are known
            return None
        wanted, found = digest(key), None
        for known, tenant in self._known:  # all of them, always
            if hmac.compare_digest(known, wanted):
                found = tenant
        return found

    def salt(self, tenant: Tenant, own: str = "") -> str:
        """What this tenant's pages are keyed with; `own` is the salt that it asked for itself."""
        said = json.dumps([tenant.name, own]).encode()
        return hmac.new(self._secret, b"kvd cache salt\0" + said, hashlib.sha256).hexdigest()[:32]

    def salted(self, tenant: Tenant, body: bytes) -> bytes:
        """The body with the tenant's salt instead of any that it had. Raises Unsaltable."""
        try:
            request = _decode(body)
        except UNDECODABLE as error:
            raise Unsaltable(f"the body is not JSON: {error}") from error
        if not isinstance(request, dict):
            raise Unsaltable("the body is not a JSON object")
        if taken := _OURS & request.keys():
            raise Unsaltable(f"{', '.join(sorted(taken))}: only the router says where else a worker connects")
        if SALT_FIELD not in request:  # then no spelling of it is there, and what was sent stays as it is
            at = body.rindex(b"}")
            comma = b"," if request else b""
            return b'%b%b"%b":"%b"}' % (body[:at], comma, SALT_FIELD.encode(), self.salt(tenant).encode())
        own = request[SALT_FIELD]
        salt: Any = [self.salt(tenant, str(one or "")) for one in own] if isinstance(own, list) else ""
        try:  # by the standard library, which keeps integers of any size, and goes less deep
            return json.dumps(json.loads(body) | {SALT_FIELD: salt or self.salt(tenant, str(own or ""))}).encode()
        except UNDECODABLE as error:
            raise Unsaltable(f"the body cannot be given another salt: {error}") from error
