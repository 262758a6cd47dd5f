"""`kvdctl import`: the pages of sealed Arrow files into this node's kvd, as if a worker had stored them.

Nothing is stored before all files have been looked at: one that cannot be right stops all. Pages are stored parents
first; each is compared with its checksums before kvd gets it, and again by whoever reads it.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer

from kvd import wire
from kvd.client import Link
from kvd.ctl.moving import needs_pyarrow
from kvd.ctl.moving.order import runs
from kvd.ctl.moving.visitor import Payload, Tally, Visitor, batches
from kvd.ctl.terminal import (
    FINE,
    TIMEOUT_S,
    WRONG,
    JsonOption,
    SocketOption,
    attached,
    reporting,
    show_json,
    size,
    socket_path,
)
from kvd.errors import KvdError
from kvd.storage.tier import Name, Page

if TYPE_CHECKING:
    from kvd.storage.shared.lonefile import SealedReader

LABEL = "kvdctl import"
_UNKNOWN_LABEL = "(imported)"

FilesArgument = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Files of kvdctl export, or *.pages.arrow of a shared tier.")
]


class Imported(msgspec.Struct):
    """In pages. `refused`: no room for them. `damaged`: not stored."""

    new: int
    held: int
    refused: int
    damaged: int
    bytes: int
    seconds: float


class Source(NamedTuple):
    """Where a page comes from."""

    reader: "SealedReader"
    number: int
    page: Page
    stamp: int


def command(files: FilesArgument, socket: SocketOption = None, as_json: JsonOption = False) -> None:
    """Store the pages of exported files in this kvd.

    They are stored as a worker stores pages: evictable, and written to the tiers below in the background. Workers of
    the same model (the same weights, dtypes, layout and page size) find them; others never see them. A page that is
    here already is left as it is, so importing a file again is harmless. Files of a shared tier can be given too,
    without what has been removed there since.

    \b
    Examples:
      kvdctl import system-prompt.arrow
      kvdctl import /mnt/backup/node7/*.pages.arrow --json

    \b
    Exit status: 0 all pages are here, 1 some or all are not, 2 wrong usage, 3 no daemon reachable.
    """
    with reporting(as_json):
        needs_pyarrow()
        from kvd.storage.shared.lonefile import SealedReader

        started = time.monotonic()
        with ExitStack() as stack:
            link = stack.enter_context(attached(socket))
            readers = []
            for file in files:
                readers.append(SealedReader(file))
                stack.callback(readers[-1].close)
            by_namespace = gather(readers)
            specs = [settle(link, digest, list(found.values())) for digest, found in by_namespace.items()]
            tally = Tally()
            for spec, found in zip(specs, by_namespace.values(), strict=True):
                with Visitor(socket_path(socket), LABEL, spec) as visitor:
                    store(visitor, list(found.values()), tally)
        seconds = round(time.monotonic() - started, 3)
        result = Imported(tally.new, tally.held, tally.refused, tally.damaged, tally.bytes, seconds)
        if as_json:
            show_json(result)
        else:
            _show(result)
        raise typer.Exit(WRONG if tally.refused or tally.damaged else FINE)


def gather(readers: Sequence["SealedReader"]) -> dict[bytes, dict[Name, Source]]:
    """The pages of all files by namespace; of a page that is in several, the copy that was stored last."""
    found: dict[bytes, dict[Name, Source]] = {}
    for reader in readers:
        for number in range(len(reader.rows)):
            page, _, stamp = reader.rows[number]
            sources = found.setdefault(page.namespace, {})
            if page.name not in sources or sources[page.name].stamp < stamp:
                sources[page.name] = Source(reader, number, page, stamp)
    return found


def settle(link: Link, digest: bytes, sources: Sequence[Source]) -> wire.NamespaceSpec:
    """What this namespace is: as the workers here say, else the files, else what follows from the pages.

    Nothing that decides over bytes is guessed: the digest names the model, and sizes are the pages' own. Raises
    KvdError where pages are of another size than the namespace's.
    """
    first = sources[0]
    known = link.ask(wire.GetNamespace(digest), wire.NamespaceKnown, TIMEOUT_S).spec
    told = next((source.reader.specs[digest] for source in sources if digest in source.reader.specs), None)
    tokens = max(source.page.tokens for source in sources)
    if not (known or told or tokens):
        raise KvdError(
            f"{first.reader.path} does not say how many tokens a page of namespace {digest.hex()} stands for",
            "start a worker of that model here, then import again",
        )
    likely = wire.NamespaceSpec(digest, first.page.length, tokens, 0, first.page.shards, "kv", _UNKNOWN_LABEL)
    for source in sources:  # each file by itself first: which of them is wrong?
        if digest in source.reader.specs:
            _agrees(source, source.reader.specs[digest], "it says itself")
    for source in sources:
        _agrees(source, known or told or likely, "here" if known else "in another file")
    return known or told or likely


def _agrees(source: Source, spec: wire.NamespaceSpec, where: str) -> None:
    page = source.page
    sizes, expected = (page.shards, page.length), (spec.shards, spec.page_bytes)
    if sizes == expected and page.tokens in (0, spec.page_tokens):
        return
    has = f"{page.shards} x {page.length:,} bytes, {page.tokens} tokens"
    should = f"{spec.shards} x {spec.page_bytes:,} bytes, {spec.page_tokens} tokens"
    raise KvdError(
        f"{source.reader.path}: pages of {has}; those of namespace {spec.digest.hex()} have {should}, as {where}",
        "the file was not made by a worker of this model: export it again",
    )


def store(visitor: Visitor, sources: Sequence[Source], tally: Tally) -> None:
    """Store pages of one namespace, and count what became of them."""
    pages = [source.page for source in sources]
    by_name = {source.page.name: source for source in sources}
    for run in runs(pages):
        for batch in batches([pages[position] for position in run]):
            chosen = [by_name[page.name] for page in batch]
            tally.add(visitor.store(batch, lambda wanted, chosen=chosen: _read([chosen[n] for n in wanted])))  # type: ignore[misc]


def _read(sources: Sequence[Source]) -> list[Payload | None]:
    found: dict[Name, Payload | None] = {}
    for reader in {id(source.reader): source.reader for source in sources}.values():
        mine = [source for source in sources if source.reader is reader]
        payloads = reader.read([source.number for source in mine])
        found |= {source.page.name: payload for source, payload in zip(mine, payloads, strict=True)}
    return [found[source.page.name] for source in sources]


def _show(result: Imported) -> None:
    new = f"{result.new:,} pages are new ({size(result.bytes)})"
    print(f"{new}, {result.held:,} were here already, in {result.seconds:.1f} s")
    if result.refused:
        print(f"{result.refused:,} pages: NO ROOM, everything in memory is in use. Import again when it is not.")
    if result.damaged:
        print(f"{result.damaged:,} pages are DAMAGED in the file and were left out: copy it again, import again.")
