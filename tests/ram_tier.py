"""RAM as a tier, for the contract of all tiers: the daemon's own decisions over plain memory, asked as workers ask.

What a worker and a socket do in between is left out; `close` and `open` are kill -9 and a warm start. One call at a
time, as the daemon's loop has it; a second passes with each.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import xxhash

from kvd import wire
from kvd.daemon.group import Group
from kvd.daemon.node import Node
from kvd.daemon.sessions import Session, Sessions
from kvd.index import IndexWriter, entries_for, index_bytes
from kvd.pages import NAMESPACE_BYTES
from kvd.storage.arena import SUPERBLOCK_BYTES, Arena
from kvd.storage.tier import Buffers, Name, News, Page, Usage

EXTENT = 1 << 20
_MEMORY: dict[Path, bytearray] = {}  # outlives a tier, as shared memory does a daemon


class RamTier:
    """A node of so many extents."""

    def __init__(self, folder: Path, extents: int = 24) -> None:
        self._memory = _MEMORY.setdefault(folder, bytearray(SUPERBLOCK_BYTES + extents * EXTENT))
        self._arena = Arena(memoryview(self._memory), EXTENT)
        entries = entries_for(4096)
        self._index = IndexWriter(memoryview(bytearray(index_bytes(entries))), entries, 1)
        self.node = Node(self._arena, self._index, Sessions())
        self._sessions: dict[tuple[int, int, int], Session] = {}
        self._lock = threading.RLock()
        self._now = 100.0
        if self._arena.recognise():
            self._arena.format()
        else:
            self.node.recover(self._arena.reopen(), self._now)
        self._known = self._held()

    @property
    def counters(self) -> Mapping[str, int]:
        return self.node.counters

    def put(self, pages: Sequence[tuple[Page, Buffers]]) -> list[bool]:
        with self._lock:
            self._now += 1.0
            return [self._put(page, buffers) for page, buffers in pages]

    def _put(self, page: Page, buffers: Buffers) -> bool:
        if not page.length or not buffers or len(buffers) != page.shards:
            return False
        if any(len(buffer) < page.length for buffer in buffers):
            return False
        for shard, buffer in enumerate(buffers):
            session = self._session(page.namespace, page.length, shard, page.shards)
            request = wire.ReservePages(1, 0, page.key, 10.0, page.parent)
            reserved = self.node.intake.reserve(session, request, self._now)
            offset, generation, verdict = wire.RESERVED_ROW.unpack(reserved.rows)
            rows = b""
            if verdict == wire.WRITE:
                self._memory[offset : offset + page.length] = buffer[: page.length]
                rows = wire.COMMIT_ROW.pack(offset, generation, page.checksums[shard])
            if reserved.reservation:
                self.node.intake.commit(session, wire.CommitPages(2, reserved.reservation, rows), self._now)
        held = self._group(page.name) is not None
        if held:
            self._known.add(page.name)
        return held

    def find(self, names: Sequence[Name]) -> list[Page | None]:
        with self._lock:
            return [self._page(group) if (group := self._group(name)) else None for name in names]

    def get(self, wanted: Sequence[tuple[Name, Buffers]]) -> list[Page | None]:
        with self._lock:
            self._now += 1.0
            return [self._get(name, buffers) for name, buffers in wanted]

    def _get(self, name: Name, buffers: Buffers) -> Page | None:
        group = self._group(name)
        if group is None or len(buffers) != len(group.slots):
            return None
        rounded = -(-group.length // 4096) * 4096
        if any(len(buffer) != rounded for buffer in buffers):
            return None
        page = self._page(group)
        for shard, buffer in enumerate(buffers):
            session = self._session(group.namespace, group.length, shard, len(buffers))
            leased = self.node.reading.lease(session, wire.LeasePages(1, 0, group.key, 5.0), self._now)
            offset, _, length, checksum = wire.LEASED_ROW.unpack(leased.rows)
            buffer[:length] = self._memory[offset : offset + length]
            right = length > 0 and xxhash.xxh3_128_digest(buffer[:length]) == checksum
            self.node.reading.release(session, leased.lease, [] if right else [0], self._now)
            if not right:
                return None
        return page

    def remove(self, names: Sequence[Name]) -> None:
        """Of a chain RAM lets go from its end; what hangs below a page that an operator takes out begins anew."""
        with self._lock:
            for group in filter(None, map(self._group, names)):
                for other in self.node.residency.disown(group, self._now):
                    self._index.publish(other.namespace, other.key, other.place, other.depth)
                self.node.space.drop(group, self._now)
                self._known.discard(group.namespace + group.key)

    def names(self) -> Iterator[list[Name]]:
        with self._lock:
            yield list(self._held())

    def tend(self) -> None:
        """The daemon's own tick does it."""

    def news(self) -> News:
        with self._lock:
            held = self._held()
            left, self._known = list(self._known - held), held
            return News([], left)

    def judge(self, density: Sequence[float]) -> None:
        """RAM has the judge in its own process."""

    def used(self, pages: Sequence[tuple[Name, int]]) -> None:
        """It sees uses itself."""

    def belongs(self, namespace: bytes, tenant: str) -> None:
        """Workers say so when they join."""

    def held(self) -> dict[str, int]:
        return {}

    @property
    def floor(self) -> None:
        return None

    def usage(self) -> Usage:
        with self._lock:
            total = self._arena.extents * self._arena.extent_bytes
            return Usage(len(self.node.residency), self._arena.used_bytes, total)

    def close(self) -> None:
        with self._lock:
            assert self.node.faults() == []

    def _held(self) -> set[Name]:
        return {group.namespace + group.key for group in self.node.residency}

    def _group(self, name: Name) -> Group | None:
        return self.node.residency.get(name[:NAMESPACE_BYTES], name[NAMESPACE_BYTES:])

    def _page(self, group: Group) -> Page:
        headers = [self._arena.header(slot) for slot in group.slots]
        sums = tuple(header.checksum for header in headers)
        return Page(group.namespace, group.key, group.parent_key, group.length, sums, 16)

    def _session(self, namespace: bytes, length: int, shard: int, shards: int) -> Session:
        kind = length, shard, shards
        if kind not in self._sessions:
            number = len(self._sessions) + 1
            session = Session(number, number.to_bytes(16, "big"), 1, "worker", "contract", self._now, None)
            self.node.sessions.add(session)
            spec = wire.NamespaceSpec(namespace, length, 16, shard, shards, "kv", "contract")
            self.node.join(session, [spec], self._now)
            self._sessions[kind] = session
        return self._sessions[kind]
