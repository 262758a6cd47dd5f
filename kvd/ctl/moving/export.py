"""`kvdctl export`: prefixes into a sealed Arrow file, for another site, or for anybody with pyarrow.

First it is found out what the chains consist of, then the file is laid out, then payloads are read in batches and each
written to its place: memory is bounded, and a page that changed in between is noticed by its checksum.
"""

import socket as sockets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kvd import wire
from kvd.client import Link
from kvd.ctl.moving import needs_pyarrow
from kvd.ctl.moving.visitor import BATCH_PAGES, Visitor, batches
from kvd.ctl.naming import NamespaceOption, namespace_of, pages_named
from kvd.ctl.terminal import (
    FINE,
    TIMEOUT_S,
    JsonOption,
    SocketOption,
    attached,
    reporting,
    show_json,
    show_table,
    size,
    socket_path,
)
from kvd.errors import KvdError
from kvd.pages import KEY_BYTES
from kvd.storage.tier import Name, Page

LABEL = "kvdctl export"
_COLUMNS = ("model and pool", "shards", "pages", "tokens", "bytes")
_NO_PARENT = bytes(KEY_BYTES)
_AGAIN = "it left while it was exported: run this again"

KeysArgument = Annotated[
    list[str], typer.Argument(metavar="KEY...", help="Keys of the chains' last pages, or the beginnings of them.")
]
ToOption = Annotated[Path, typer.Option("--to", metavar="FILE", help="The file to make; it must not exist.")]


class Part(msgspec.Struct):
    """What a file has of one namespace."""

    namespace: str
    label: str
    pool: str
    shards: int
    pages: int
    tokens: int
    bytes: int


class Exported(msgspec.Struct):
    file: str
    namespaces: list[Part]
    pages: int
    bytes: int
    seconds: float


class Choice(msgspec.Struct):
    """Pages of one namespace, parents first; each name once."""

    spec: wire.NamespaceSpec
    pages: dict[Name, Page] = {}


def command(
    keys: KeysArgument, to: ToOption, namespace: NamespaceOption = None, socket: SocketOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Write prefixes to a file, for `kvdctl import` elsewhere.

    Each KEY names a chain: the page that `kvdctl ls` shows, and all pages before it. Pages that have gone to a lower
    tier are fetched. The file is an Arrow file of the shared tier's format, with all shards of each page; it
    appears under its name when it is whole. Any pyarrow reads it: docs/shared-tier.md shows how. It holds what the
    model made of the prompts, so treat it as you treat the prompts.

    \b
    Examples:
      kvdctl export 3fa94c01d2e8 --to system-prompt.arrow
      kvdctl export $(kvdctl ls --json --limit 5 | jq -r '.prefixes[].key') --to hot.arrow

    \b
    Exit status: 0 the file is there, 1 it is not, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json):
        needs_pyarrow()
        if to.exists():
            raise KvdError(f"{to} exists", "remove it, or choose another name")
        started = time.monotonic()
        path = socket_path(socket)
        with attached(socket) as link:
            choices = choose(link, path, keys, namespace_of(namespace))
            write(path, list(choices.values()), to)
        parts = [_part(choice) for choice in choices.values()]
        pages, total = sum(part.pages for part in parts), sum(part.bytes for part in parts)
        seconds = round(time.monotonic() - started, 3)
        if as_json:
            show_json(Exported(str(to), parts, pages, total, seconds))
        else:
            rows = [(f"{p.label} {p.pool}", p.shards, p.pages, p.tokens, size(p.bytes)) for p in parts]
            show_table(_COLUMNS, rows)
            print(f"{pages:,} pages, {size(total)}, in {seconds:.1f} s: {to}")
        raise typer.Exit(FINE)


def choose(link: Link, socket: Path, heads: Sequence[str], namespace: bytes) -> dict[bytes, Choice]:
    """What is to be exported, by namespace. Raises KvdError where a chain is not whole."""
    choices: dict[bytes, Choice] = {}
    for head in heads:
        named = pages_named(link, head, namespace)
        if not named:
            raise KvdError(
                f"no page has a key that begins with {head}",
                "see kvdctl ls; a page that only a lower tier holds needs its whole key, and a worker of its model",
            )
        chains: dict[bytes, list[bytes]] = {}
        for page in named:
            if page.namespace not in choices:
                choices[page.namespace] = Choice(_spec(link, page.namespace), {})
            with Visitor(socket, LABEL, choices[page.namespace].spec) as visitor:
                chains[page.namespace] = _chain(link, visitor, page)
        longest = max(chains.values(), key=len)
        for digest, chain in chains.items():
            # A side pool's pages do not hang together: take what there is beside the pages of the chain.
            loose = len(chain) == 1 < len(longest) and choices[digest].spec.pool != "kv"
            _add(socket, choices[digest], longest if loose else chain, loose)
    return choices


def _spec(link: Link, digest: bytes) -> wire.NamespaceSpec:
    spec = link.ask(wire.GetNamespace(digest), wire.NamespaceKnown, TIMEOUT_S).spec
    if spec is None:
        raise KvdError(
            f"kvd does not know what namespace {digest.hex()} is",
            "no worker of its model has attached since kvd started: start one, then export again",
        )
    return spec


def _chain(link: Link, visitor: Visitor, page: wire.PageName) -> list[bytes]:
    """Keys from the prompt's first page to this one; those that are below RAM are fetched, the last first."""
    keys: list[bytes] = []
    missing = page.key
    while missing:
        part = link.ask(wire.GetChain(page.namespace, missing), wire.Chain, TIMEOUT_S)
        if not part.keys:
            if visitor.look([missing]) == [None]:
                raise KvdError(
                    f"the chain of {page.key.hex()} is not whole: before its last {len(keys):,} pages comes "
                    f"{missing.hex()}, which is neither in memory nor in a lower tier that works",
                    "let a worker send that prompt again, then export",
                )
            part = link.ask(wire.GetChain(page.namespace, missing), wire.Chain, TIMEOUT_S)
            if not part.keys:
                raise KvdError(f"page {missing.hex()}: it was not held", _AGAIN)
        keys = [part.keys[at : at + KEY_BYTES] for at in range(0, len(part.keys), KEY_BYTES)] + keys
        missing = part.missing
    return keys


def _add(socket: Path, choice: Choice, keys: list[bytes], loose: bool) -> None:
    """The pages of these keys. Those of a chain must all be there; of loose ones, some."""
    digest, spec = choice.spec.digest, choice.spec
    new = [number for number, key in enumerate(keys) if digest + key not in choice.pages]
    with Visitor(socket, LABEL, spec) as visitor:
        for at in range(0, len(new), BATCH_PAGES):
            batch = new[at : at + BATCH_PAGES]
            for number, seen in zip(batch, visitor.look([keys[number] for number in batch]), strict=True):
                key = keys[number]
                if seen is None and not loose:
                    raise KvdError(f"page {key.hex()} is not whole in memory", _AGAIN)
                if seen is not None:
                    parent = keys[number - 1] if number and not loose else _NO_PARENT
                    choice.pages[digest + key] = Page(
                        digest, key, parent, seen.length, seen.checksums, spec.page_tokens
                    )


def write(socket: Path, choices: Sequence[Choice], to: Path) -> None:
    """Make the file. Raises KvdError, and then there is none."""
    from kvd.storage.shared.lonefile import SealedWriter

    pages = [page for choice in choices for page in choice.pages.values()]
    writer = SealedWriter(to, pages, [choice.spec for choice in choices], sockets.gethostname())
    try:
        at = 0
        for choice in choices:
            with Visitor(socket, LABEL, choice.spec) as visitor:
                for batch in batches(list(choice.pages.values())):
                    for page, payload in zip(batch, visitor.read(batch), strict=True):
                        if payload is None:
                            raise KvdError(f"page {page.key.hex()} has changed, or is damaged", _AGAIN)
                        writer.fill(at, payload)
                        at += 1
        writer.publish()
    finally:
        writer.close()


def _part(choice: Choice) -> Part:
    spec, pages = choice.spec, choice.pages.values()
    total = sum(page.length * page.shards for page in pages)
    return Part(
        spec.digest.hex(), spec.label, spec.pool, spec.shards, len(pages), len(pages) * spec.page_tokens, total
    )
