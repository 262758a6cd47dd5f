"""The shared tier: pages in sealed Arrow files that all nodes read, on any filesystem that pyarrow knows.

One `put` makes one file (more when it is longer than `file_bytes`), durable before it returns; small files are merged
later. Every node keeps the indexes of all files in memory, some 320 bytes a page, and learns of new files by listing
them every `poll_s`. Pages that another node has are not written again. `find` and `names` answer from memory; `get`
reads just the pages asked for. Nodes share nothing but the files, which docs/shared-tier.md describes for others.

The quota is for all nodes together, and so are the tenants' shares of it: give them the same. The oldest files go
first, whoever wrote them, as far as the shares allow. Pages of a tenant that has one lie in files of their own, which
name it. Pages of other tenants, and those that come before `belongs` has said whose they are, are nobody's for good.
"""

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import fs

from kvd.errors import SettingsError
from kvd.storage.quota import Share
from kvd.storage.shared.bucket import Bucket
from kvd.storage.shared.depot import Depot
from kvd.storage.shared.folder import Folder
from kvd.storage.shared.graves import MOST_NAMES
from kvd.storage.shared.housekeeping import Housekeeping
from kvd.storage.shared.makingroom import holdings
from kvd.storage.shared.sealed import fits
from kvd.storage.shared.sharedfiles import SharedFiles, as_tier_errors
from kvd.storage.tier import Buffers, Name, News, Page, TierError, Usage, WriteRefused

_NODE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_NAMESPACES: Final = 1 << 14


class SharedTier:
    """Implements `Tier`."""

    def __init__(
        self,
        uri: str,
        node: str,
        quota_bytes: int,
        file_bytes: int = 128 << 20,
        poll_s: float = 5.0,
        ttl_s: float | None = None,
        grace_s: float = 60.0,
        leftover_s: float = 3600.0,
        max_pages: int = 4_000_000,
        shares: Mapping[str, Share] | None = None,
    ) -> None:
        if not _NODE.fullmatch(node):
            raise SettingsError(f"{node!r} cannot name a folder", "use letters, digits, dots, dashes and underscores")
        self._shares = shares or {}
        self._tenant: dict[bytes, str] = {}  # by namespace, of those that have a share; told longest ago first
        self._files = SharedFiles(open_depot(uri), node, max_pages, self._shares.keys())
        self._housekeeping = Housekeeping(
            self._files, quota_bytes, self._shares, file_bytes, ttl_s, grace_s, leftover_s
        )
        self._quota_bytes, self._file_bytes, self._poll_s = quota_bytes, file_bytes, poll_s
        self._writing = threading.Lock()  # one put at a time, so that the quota holds
        self._polling = threading.Lock()
        self._next_poll = time.monotonic() + poll_s
        self._closed = False
        try:
            self._files.refresh()
        except TierError:
            self.close()
            raise
        self._files.news()  # what is there at the start is in `names`

    def put(self, pages: Sequence[tuple[Page, Buffers]]) -> list[bool]:
        self._check_open()
        files, good = self._files, [fits(page, buffers) for page, buffers in pages]
        offered = {page.name: (page, buffers) for (page, buffers), ok in zip(pages, good, strict=True) if ok}
        with self._writing:
            self._check_files(offered)
            for _ in range(2):  # making room may drop what was held: those pages are here, write them again
                with suppress(WriteRefused):
                    self._store_absent(offered)
            with files.lock:
                files.changes.knows(name for name in offered if name in files.copies)
                return [ok and page.name in files.copies for (page, _), ok in zip(pages, good, strict=True)]

    def _store_absent(self, offered: Mapping[Name, tuple[Page, Buffers]]) -> None:
        """What is in no file yet, while writing is of use."""
        files = self._files
        with files.lock:
            absent = [one for name, one in offered.items() if name not in files.copies]
        for tenant, pages_of_one in self._by_tenant(absent).items():
            for part in _parts(pages_of_one, self._file_bytes):
                if not files.refusal.lasts:
                    files.store(part, None, tenant, partial(self._housekeeping.make_room, tenant, len(part)))

    def find(self, names: Sequence[Name]) -> list[Page | None]:
        with self._files.lock:
            places = [self._files.copies.place(name) for name in names]
            return [place.row.page if place else None for place in places]

    def get(self, wanted: Sequence[tuple[Name, Buffers]]) -> list[Page | None]:
        self._check_open()
        return [row.page if row else None for row in self._files.fetch(wanted)]

    def remove(self, names: Sequence[Name]) -> None:
        self._check_open()
        files = self._files
        with files.lock:
            held = [name for name in dict.fromkeys(names) if name in files.copies]
        for at in range(0, len(held), MOST_NAMES):
            part = held[at : at + MOST_NAMES]
            files.bury(dict.fromkeys(part, files.stamp()))
        with files.lock:
            files.changes.knows(names)

    def names(self) -> Iterator[list[Name]]:
        with self._files.lock:
            return self._files.copies.names()

    def tend(self) -> None:
        """Polls and keeps house when that is due, which may take as long as writing a file."""
        self._check_open()
        if time.monotonic() >= self._next_poll and self._polling.acquire(blocking=False):
            try:
                self._files.refresh()
                self._housekeeping.step()
            finally:
                self._next_poll = time.monotonic() + self._poll_s
                self._polling.release()

    def news(self) -> News:
        self._check_open()
        return self._files.news()

    def judge(self, density: Sequence[float]) -> None:
        """Files leave whole, by age and share (see makingroom): there is no order of single pages to change."""

    def used(self, pages: Sequence[tuple[Name, int]]) -> None:
        """The same."""

    def belongs(self, namespace: bytes, tenant: str) -> None:
        """What is put from now on goes into files of that tenant; what is there stays whose it is."""
        if tenant in self._shares:
            self._tenant.pop(namespace, None)
            self._tenant[namespace] = tenant
            if len(self._tenant) > _MOST_NAMESPACES:
                del self._tenant[next(iter(self._tenant))]

    def held(self) -> dict[str, int]:
        """Of all nodes together, as far as this one has read."""
        if not self._shares:
            return {}
        with self._files.lock:
            quotas = holdings(self._files.copies.files.values(), self._shares)
        return {tenant: quotas.held(tenant) for tenant in self._shares}

    @property
    def floor(self) -> None:
        return None

    def usage(self) -> Usage:
        with self._files.lock:
            used = min(self._files.bytes_used, self._quota_bytes)
            return Usage(len(self._files.copies), used, self._quota_bytes)

    @property
    def counters(self) -> dict[str, int]:
        """Misses, skipped files and housekeeping, by reason."""
        return dict(self._files.counters)

    def check(self) -> list[str]:
        """Broken invariants, in words."""
        with self._files.lock:
            return self._files.copies.check()

    def close(self) -> None:
        self._closed = True
        self._files.close()

    def _by_tenant(self, pages: Sequence[tuple[Page, Buffers]]) -> dict[str, list[tuple[Page, Buffers]]]:
        """In the order they came; "": nobody's."""
        found: dict[str, list[tuple[Page, Buffers]]] = {}
        for page, buffers in pages:
            found.setdefault(self._tenant.get(page.namespace, ""), []).append((page, buffers))
        return found

    def _check_open(self) -> None:
        if self._closed:
            raise TierError("the shared tier is closed")

    def _check_files(self, offered: dict[Name, tuple[Page, Buffers]]) -> None:
        """What is said to be held must be there now: another node may have deleted the file since the last poll."""
        files = self._files
        with files.lock:
            places = [files.copies.place(name) for name in offered]
            paths = {place.file.path for place in places if place}
        for path in paths:
            with as_tier_errors():
                there = files.depot.exists(path)
            if not there:
                files.forget(path)


def open_depot(uri: str) -> Depot:
    """Raises SettingsError for what pyarrow does not understand."""
    # By default pyarrow's S3 client adds checksums in a form that many servers refuse; our files have their own.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    try:
        filesystem, path = fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SettingsError(f"cannot open {uri}: {error}", "a path, or a URI that pyarrow.fs knows") from error
    with as_tier_errors():
        local = isinstance(filesystem, fs.LocalFileSystem)
        return Folder(Path(path)) if local else Bucket(filesystem, path)


def _parts(pages: Sequence[tuple[Page, Buffers]], file_bytes: int) -> Iterator[list[tuple[Page, Buffers]]]:
    """Pages in the order they came, cut where a file is full."""
    part: list[tuple[Page, Buffers]] = []
    size = 0
    for page, buffers in pages:
        payload = page.length * page.shards
        if part and size + payload > file_bytes:
            yield part
            part, size = [], 0
        part.append((page, buffers))
        size += payload
    if part:
        yield part
