"""How people name pages: by the beginning of a key, as `kvdctl ls` shows it; a namespace by its 32 hex digits."""

import re
from typing import Annotated, Final

import typer

from kvd import wire
from kvd.client import Link
from kvd.ctl.terminal import TIMEOUT_S
from kvd.errors import KvdError
from kvd.pages import KEY_BYTES, NAMESPACE_BYTES

_HEX: Final = re.compile(r"[0-9a-f]+")
_SHOWN: Final = 4  # of the keys that a beginning fits

NamespaceOption = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        metavar="HEX",
        help='Only pages of this namespace: 32 digits, "namespace" in `kvdctl ls --json`.',
    ),
]


def namespace_of(given: str | None) -> bytes:
    """Empty where none is given. Raises KvdError."""
    if given is None:
        return b""
    if not _HEX.fullmatch(given.lower()) or len(given) != 2 * NAMESPACE_BYTES:
        raise KvdError(f"{given!r} is no namespace", f"it has {2 * NAMESPACE_BYTES} hex digits: see kvdctl ls --json")
    return bytes.fromhex(given)


def is_whole(head: str) -> bool:
    return len(head) == 2 * KEY_BYTES


def pages_named(link: Link, head: str, namespace: bytes) -> list[wire.PageName]:
    """The pages of the one key that begins so, one for each namespace that has it; none where nothing does.

    Raises KvdError where several keys begin so, or none could.
    """
    head = head.lower()
    if not _HEX.fullmatch(head) or len(head) > 2 * KEY_BYTES:
        raise KvdError(f"{head!r} is no page key", f"keys are up to {2 * KEY_BYTES} hex digits: see kvdctl ls")
    found: dict[tuple[bytes, bytes], wire.PageName] = {}
    cursor = 0
    while cursor >= 0:
        part = link.ask(wire.FindPages(head, namespace, cursor), wire.PagesFound, TIMEOUT_S)
        found |= {(page.namespace, page.key): page for page in part.pages}
        cursor = part.next
        keys = sorted({page.key for page in found.values()})
        if len(keys) > 1:
            shown = ", ".join(key.hex() for key in keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
            raise KvdError(f"several keys begin with {head}: {shown}", "give more of the key")
    return list(found.values())
