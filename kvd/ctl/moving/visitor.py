"""kvdctl as a worker: joins a namespace with all its shards, reads pages and stores pages as a worker's plugin does.

What is read is compared with its checksums in this process's own memory; what is damaged is told kvd, which
quarantines it. Everything held ends with the session, however this process ends.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
import xxhash
import zmq

from kvd import wire
from kvd.client import Channel, Link
from kvd.ctl.terminal import TIMEOUT_S
from kvd.errors import KvdError
from kvd.leasetable import LeaseTable
from kvd.storage.tier import Page

_BATCH_BYTES: Final = 8 << 20
BATCH_PAGES: Final = 128
_TTL_S: Final = 60.0  # the most that kvd grants
_WAIT_S: Final = 10.0  # for pages that come up from a lower tier
_TIMEOUT_S: Final = _WAIT_S + TIMEOUT_S  # to move much, no haste; that kvd has died is known at once
_MOST_SHARDS: Final = 256  # namespaces that kvd lets a session join

R = TypeVar("R", bound=wire.Message)
Payload = Sequence[memoryview]  # a buffer per shard


class Seen(NamedTuple):
    """A page that is in RAM: the payload bytes of one shard, and each shard's checksum."""

    length: int
    checksums: tuple[bytes, ...]


class Tally(msgspec.Struct):
    """What became of pages that were to be stored."""

    new: int = 0
    held: int = 0
    refused: int = 0
    damaged: int = 0
    bytes: int = 0  # of the new ones

    def add(self, other: "Tally") -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Visitor:
    """A session in one namespace. Raises KvdError from everything."""

    def __init__(self, socket: Path, label: str, spec: wire.NamespaceSpec) -> None:
        if spec.shards > _MOST_SHARDS:
            raise KvdError(f"pages of {spec.shards} shards", f"kvdctl moves those of up to {_MOST_SHARDS}")
        self.spec = spec
        self._leases = LeaseTable()
        try:
            self._link = Link(socket, "worker", label, self._leases.fd, TIMEOUT_S)
        except BaseException:
            self._leases.close()
            raise
        welcome = self._link.welcome
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # Nothing comes over the link unasked: readable, it says that kvd is gone.
        gone_fd = self._link.sock.fileno()
        self._channel = Channel(self._context, welcome.data_endpoint, welcome.ticket + bytes(4), gone_fd)
        try:
            self._link.send(wire.Report("closed", {}))
            specs = [msgspec.structs.replace(spec, shard=shard) for shard in range(spec.shards)]
            self._shards = self._link.ask(wire.Join(specs), wire.Joined, TIMEOUT_S).ids
        except BaseException:
            self.close()
            raise

    # -- reading -------------------------------------------------------------------------------------------

    def look(self, keys: Sequence[bytes]) -> list[Seen | None]:
        """What is there of these pages, fetched from lower tiers where need be; None: nothing."""
        each = [self._leased(ns, keys, None) for ns in self._shards]
        found: list[Seen | None] = []
        for rows in zip(*each, strict=True):
            lengths = {length for length, _, _ in rows}
            whole = len(lengths) == 1 and 0 not in lengths
            found.append(Seen(rows[0][0], tuple(checksum for _, checksum, _ in rows)) if whole else None)
        return found

    def read(self, pages: Sequence[Page]) -> list[list[bytes] | None]:
        """Payloads; None for a page that is absent, damaged, or another one than `look` saw."""
        each = [self._leased(ns, [p.key for p in pages], n, pages) for n, ns in enumerate(self._shards)]
        found: list[list[bytes] | None] = []
        for rows in zip(*each, strict=True):
            shards = [data for _, _, data in rows if data is not None]
            found.append(shards if len(shards) == len(self._shards) else None)
        return found

    def _leased(
        self, ns: int, keys: Sequence[bytes], shard: int | None, pages: Sequence[Page] = ()
    ) -> list[tuple[int, bytes, bytes | None]]:
        """Of each page a shard's length and checksum, and with a `shard` its bytes where they are as `pages` say."""
        joined = b"".join(keys)
        found: list[tuple[int, bytes, bytes | None]] = []
        bad: list[int] = []
        leased = self._ask(lambda n: wire.LeasePages(n, ns, joined, _TTL_S, _WAIT_S), wire.Leased)
        present = -1
        for number, (offset, _, length, checksum) in enumerate(wire.LEASED_ROW.iter_unpack(leased.rows)):
            present += length > 0
            data = None
            if shard is not None and length == pages[number].length and checksum == pages[number].checksums[shard]:
                data = self._link.arena[offset : offset + length]
                if xxhash.xxh3_128_digest(data) != checksum:
                    bad.append(present)
                    data = None
            found.append((length, checksum, data))
        if leased.lease:
            self._channel.tell(wire.ReleaseLease(leased.lease, bad))
        if bad:  # answered after that was heard: hanging up may lose what is under way
            self._ask(lambda n: wire.Lookup(n, ns, keys[0], 0.001), wire.Found)
        return found

    # -- storing -------------------------------------------------------------------------------------------

    def store(self, run: Sequence[Page], payloads: Callable[[list[int]], Sequence[Payload | None]]) -> Tally:
        """Store pages, each the parent of the next. `payloads` is asked for those that kvd wants; None: damaged."""
        joined, first = b"".join(page.key for page in run), run[0].parent
        parent = first if any(first) else b""
        tally = Tally()
        granted = [self._ask(partial(_reserve, ns, joined, parent), wire.Reserved) for ns in self._shards]
        rows = [list(wire.RESERVED_ROW.iter_unpack(one.rows)) for one in granted]
        verdicts = [{row[2] for row in page} for page in zip(*rows, strict=True)]
        wanted = [n for n, verdict in enumerate(verdicts) if wire.WRITE in verdict and wire.NO_ROOM not in verdict]
        tally.held = sum(verdict == {wire.HELD} for verdict in verdicts)
        tally.refused = len(run) - len(wanted) - tally.held
        found = payloads(wanted) if wanted else []
        good = [(n, payload) for n, payload in zip(wanted, found, strict=True) if payload is not None]
        tally.damaged = len(wanted) - len(good)
        taken = [len(good)]
        for shard, one in enumerate(granted):
            if not one.reservation:
                continue
            mine = [(rows[shard][n], run[n], payload[shard]) for n, payload in good]
            done = b"".join(self._copy(row, page.checksums[shard], data) for row, page, data in mine)
            reply = self._ask(partial(_commit, one.reservation, done), wire.Committed)
            taken.append(reply.pages + sum(row[2] == wire.HELD for row, _, _ in mine))
        tally.new = min(taken)
        tally.refused += len(good) - tally.new  # it took longer than the reservation
        tally.bytes = tally.new * self.spec.page_bytes * len(self._shards)
        return tally

    def _copy(self, row: tuple[int, int, int], checksum: bytes, data: memoryview) -> bytes:
        """A row of the commit; nothing for a shard that kvd has already."""
        offset, generation, verdict = row
        if verdict != wire.WRITE:
            return b""
        self._link.arena[offset : offset + len(data)] = data
        return wire.COMMIT_ROW.pack(offset, generation, checksum)

    def _ask(self, make: Callable[[int], wire.FromWorker], kind: type[R]) -> R:
        return self._channel.ask(make, kind, _TIMEOUT_S)

    def close(self) -> None:
        """May be called twice."""
        self._link.close()
        self._channel.close()
        self._context.term()
        self._leases.close()

    def __enter__(self) -> "Visitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batches(pages: Sequence[Page]) -> Iterator[Sequence[Page]]:
    """Of one namespace, whose pages are equally large: few enough for our memory and kvd's patience."""
    each = max(1, min(BATCH_PAGES, _BATCH_BYTES // (pages[0].length * pages[0].shards)))
    return (pages[at : at + each] for at in range(0, len(pages), each))


def _reserve(ns: int, keys: bytes, parent: bytes, request: int) -> wire.ReservePages:
    return wire.ReservePages(request, ns, keys, _TTL_S, parent)


def _commit(reservation: int, rows: bytes, request: int) -> wire.CommitPages:
    return wire.CommitPages(request, reservation, rows)
