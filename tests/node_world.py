"""A node over plain memory, and workers that act on it: what the tests of the daemon's decisions share."""

import hashlib
import random
from pathlib import Path

import xxhash

from kvd import wire
from kvd.daemon.node import Node
from kvd.daemon.sessions import Session, Sessions
from kvd.index import IndexReader, IndexWriter, Name, entries_for, index_bytes
from kvd.pages import chain
from kvd.storage.arena import SUPERBLOCK_BYTES, Arena
from kvd.storage.quota import Quotas

EXTENT = 1 << 16
PAGES = {2: 4096, 1: 9000}  # shards -> page bytes: two size classes, one of them in two shards


def payload(namespace: bytes, key: bytes, shard: int, length: int) -> bytes:
    """What that page must hold, always."""
    return random.Random(namespace + key + bytes([shard])).randbytes(length)


def namespace(n: int) -> bytes:
    return hashlib.sha256(bytes([n])).digest()[:16]


def spec(shards: int, shard: int = 0, n: int | None = None) -> wire.NamespaceSpec:
    return wire.NamespaceSpec(namespace(shards if n is None else n), PAGES[shards], 4, shard, shards, "kv", "test")


class World:
    """A node over plain memory, with helpers that act as a worker would."""

    def __init__(
        self, extents: int = 6, entries: int = entries_for(4096), quotas: Quotas | None = None,
        ttl_s: float | None = None, pins_file: Path | None = None,
    ) -> None:  # fmt: skip
        self.entries = entries
        self.quotas, self.ttl_s, self.pins_file = quotas, ttl_s, pins_file
        self.memory = bytearray(SUPERBLOCK_BYTES + extents * EXTENT)
        self.now = 100.0
        self.sessions_made = 0
        self.start()

    def start(self) -> None:
        """A new daemon over the same memory: after kill -9."""
        self.index_memory = memoryview(bytearray(index_bytes(self.entries)))
        arena = Arena(memoryview(self.memory), EXTENT)
        index = IndexWriter(self.index_memory, self.entries, 1)
        self.node = Node(arena, index, Sessions(), self.quotas, self.ttl_s, self.pins_file)
        self.reader = IndexReader(self.index_memory)
        if arena.recognise():
            arena.format()
        else:
            self.node.recover(arena.reopen(), self.now)

    def session(self, *specs: wire.NamespaceSpec) -> Session:
        self.sessions_made += 1
        session = Session(self.sessions_made, self.sessions_made.to_bytes(16, "big"), 1, "worker", "t", self.now, None)
        self.node.sessions.add(session)
        self.node.join(session, list(specs), 0.0)
        return session

    def reserve(self, session: Session, keys: list[bytes], parent: bytes = b"", ns: int = 0) -> wire.Reserved:
        request = wire.ReservePages(1, ns, b"".join(keys), 10.0, parent)
        return self.node.intake.reserve(session, request, self.now)

    def commit(self, session: Session, keys: list[bytes], reserved: wire.Reserved, ns: int = 0, step: int = 64) -> int:
        """Write the right bytes to every reserved place, and commit, `step` pages a message."""
        s = session.namespaces[ns]
        rows: list[bytes] = []
        if not reserved.reservation:
            return 0
        for key, (offset, generation, verdict) in zip(keys, wire.RESERVED_ROW.iter_unpack(reserved.rows), strict=True):
            if verdict == wire.WRITE:
                data = payload(s.digest, key, s.shard, s.page_bytes)
                self.memory[offset : offset + len(data)] = data
                rows.append(wire.COMMIT_ROW.pack(offset, generation, xxhash.xxh3_128_digest(data)))
        steps = [b"".join(rows[at : at + step]) for at in range(0, len(rows), step)] or [b""]
        for done in steps[:-1]:
            more = wire.CommitPages(0, reserved.reservation, done, more=True)
            assert self.node.intake.commit(session, more, self.now) is None
        committed = self.node.intake.commit(session, wire.CommitPages(1, reserved.reservation, steps[-1]), self.now)
        assert committed is not None, "the last one is answered"
        return committed.pages

    def put(self, session: Session, keys: list[bytes], parent: bytes = b"", ns: int = 0) -> int:
        return self.commit(session, keys, self.reserve(session, keys, parent, ns), ns)

    def take(self, session: Session, keys: list[bytes], ns: int = 0, bad: bool = False) -> list[bool]:
        """Lease, verify as a worker does, release. True where right bytes came."""
        s = session.namespaces[ns]
        leased = self.node.reading.lease(session, wire.LeasePages(1, ns, b"".join(keys), 5.0), self.now)
        got, wrong = [], []
        for key, (offset, _, length, checksum) in zip(keys, wire.LEASED_ROW.iter_unpack(leased.rows), strict=True):
            data = bytes(self.memory[offset : offset + length])
            right = length > 0 and xxhash.xxh3_128_digest(data) == checksum
            if right:
                assert data == payload(s.digest, key, s.shard, s.page_bytes), "WRONG BYTES"
            elif length:
                wrong.append(sum(got) + len(wrong))
            got.append(right)
        if leased.lease:
            self.node.reading.release(session, leased.lease, wrong, self.now)
        return got

    def leading(self, keys: list[bytes], ns: bytes) -> int:
        return self.reader.leading(Name.of(ns), [key.hex() for key in keys]).pages


KEYS = [chain([n, *range(60)], 4) for n in range(4)]  # four conversations of 15 pages
BRANCH = chain([*[0, *range(60)][:20], *range(900, 940)], 4)  # shares 5 pages with the first
