"""`kvdctl pin`, `unpin` and `pins`: prefixes that stay."""

from typing import Annotated

import typer

from kvd import wire
from kvd.client import Link
from kvd.ctl.naming import NamespaceOption, namespace_of, pages_named
from kvd.ctl.terminal import TIMEOUT_S, JsonOption, SocketOption, attached, reporting, show_json, show_table, size
from kvd.errors import KvdError

_COLUMNS = ("key", "pages", "in memory", "model and pool")
_KEY_HEAD = 12  # characters that tell keys apart on a screen
_WRITE_TIMEOUT_S = 30.0  # kvd answers when pins_file is on its disk, which may be busy

KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="A page's key as kvdctl ls shows it, or the beginning of it.")
]


def pin(
    key: KeyArgument, namespace: NamespaceOption = None, socket: SocketOption = None, as_json: JsonOption = False
) -> None:
    """Keep a prefix: its pages are not evicted.

    All of them stay, from the prompt's first page to KEY: for prompts that must answer fast however long nobody sends
    them, a system prompt or a document. They stay in memory and, where there is one, on this node's disk tier; a
    shared tier does not know of pins. They outlive a restart of kvd; for a reboot of the node set `pins_file` to a
    path on a disk. Only what is in memory can be pinned: send the prompt once, then look for it in `kvdctl ls`. Pins
    may take half of the memory.

    \b
    Examples:
      kvdctl pin 3fa94c01d2e8
      kvdctl pins
      kvdctl unpin 3fa94c01d2e8

    \b
    Exit status: 0 pinned, 1 refused, 2 wrong usage, 3 no daemon reachable.
    """
    _change(key, namespace, socket, as_json, keep=True)


def unpin(
    key: KeyArgument, namespace: NamespaceOption = None, socket: SocketOption = None, as_json: JsonOption = False
) -> None:
    """Let a pinned prefix leave again when room is needed. KEY is what `kvdctl pins` shows.

    \b
    Exit status: 0 unpinned, 1 there is no such pin, 2 wrong usage, 3 no daemon reachable.
    """
    _change(key, namespace, socket, as_json, keep=False)


def pins(socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """List the prefixes that are pinned.

    Also how many of their pages are in memory, and how much of it pins may take.

    \b
    Exit status: 0 kvd answered, 1 kvd refused, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json), attached(socket) as link:
        held = link.ask(wire.GetPins(), wire.Pins, TIMEOUT_S)
        if as_json:
            show_json(held)
        elif not held.pins:
            print("Nothing is pinned.")
        else:
            rows = [(p.key.hex()[:_KEY_HEAD], p.pages, p.in_ram, p.label) for p in held.pins]
            show_table(_COLUMNS, rows)
            print(f"{size(held.bytes_in_ram)} of {size(held.bytes_limit)} that pins may take in memory.")


def _change(key: str, namespace: str | None, socket: SocketOption, as_json: bool, keep: bool) -> None:
    with reporting(as_json), attached(socket) as link:
        found = _meant(link, key, namespace_of(namespace), keep)
        asked = [wire.Pin(page.namespace, page.key, keep) for page in found]
        changed = [link.ask(one, wire.Pinned, _WRITE_TIMEOUT_S) for one in asked]
        if as_json:
            show_json(changed)
            return
        for one in changed:
            print(f"{'pinned' if keep else 'unpinned'}: {one.pages} pages, {size(one.bytes_in_ram)} in memory")


def _meant(link: Link, head: str, namespace: bytes, keep: bool) -> list[wire.PageName]:
    """The one key that begins so: among the pages in memory, or to unpin, among the pins. Raises KvdError."""
    if keep:
        found = pages_named(link, head, namespace)
        if not found:
            raise KvdError(
                f"no page in memory has a key that begins with {head}", "send the prompt, then see kvdctl ls"
            )
        return found
    held = link.ask(wire.GetPins(), wire.Pins, TIMEOUT_S).pins
    fits = [p for p in held if p.key.hex().startswith(head.lower()) and namespace in (b"", p.namespace)]
    if len({p.key for p in fits}) != 1:
        what = "several pins begin" if fits else "no pin begins"
        raise KvdError(f"{what} with {head}", "see kvdctl pins")
    return [wire.PageName(p.namespace, p.key) for p in fits]
