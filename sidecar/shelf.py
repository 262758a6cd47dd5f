"""One pool of one worker, put into kvd and taken out of it in batches: `has`, `put`, `take`.

Each is one or two messages and the copies between them, all before one deadline. What cannot be done is a miss,
counted under its reason. Raises only what the caller must know: Unavailable when kvd failed us.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Sequence

from kvd import wire
from kvd.client import Channel
from kvd.errors import DeadlineMissed
from kvd.index import LOWER, Match, Name
from kvd.sidecar.config import PluginConfig
from kvd.sidecar.copier import Copier, Move
from kvd.sidecar.pool import PageSource
from kvd.sidecar.prefill import PrefillCosts
from kvd.sidecar.session import Attachment, Session

_MARGIN_S = 1.0  # a lease outlives the deadline of the call that uses it
_MAX_PROMISES = 512
_FETCH_TIMEOUT_S = 0.1  # SGLang looks storage up from a thread of its own
_COPY_BYTES_PER_S = 1e9  # slower than hosts are
_COPY_MARGIN_S = 0.3
_COMMIT_PAGES = 32  # a quarter of SGLang's batch: the last step is all that a writer waits for


class Shelf:
    """Thread-safe. `ns` is the namespace's number in sessions that joined `roster`, and means nothing in others."""

    def __init__(
        self, session: Session, roster: list[wire.NamespaceSpec], ns: int, copier: Copier, config: PluginConfig,
        counters: Counter[str],
    ) -> None:  # fmt: skip
        self.spec = spec = roster[ns]
        self._session = session
        self._roster = roster
        self._ns = ns
        self._name = Name.of(spec.digest)
        self._copier = copier
        self._config = config
        self._counters = counters
        self._prefill = PrefillCosts(spec.page_tokens)
        self._promises: OrderedDict[str, tuple[int, ...]] = OrderedDict()  # deepest key -> what the table holds

    def _attached(self) -> Attachment | None:
        """The daemon, when it can be used for this shelf now."""
        session = self._session
        attachment = session.attachment
        usable = attachment is not None and attachment.roster is self._roster and attachment.joined > self._ns
        if not usable or not session.circuit.closed:
            self._counters["miss_detached"] += 1
            return None
        return attachment

    # -- lookup --------------------------------------------------------------------------------------------

    def has(self, keys: Sequence[str], prefix: Sequence[str] = ()) -> int:
        """How many leading pages of a chain are held; they stay for `promise_s`. `prefix` are the pages before."""
        attachment = self._attached()
        if attachment is None or not keys:
            return 0
        match = attachment.index.leading(self._name, keys)
        pages = match.pages
        if match.lower:
            pages = self._fetch(attachment, keys[:pages], prefix)
        elif pages and not self._promise(attachment, keys[pages - 1], match):
            pages = self._ask(attachment, keys[:pages], prefix, self._config.exists_timeout_s)
        self._prefill.looked_up(keys, pages, len(prefix), time.monotonic())
        return pages

    def has_each(self, keys: Sequence[str]) -> list[bool]:
        """Which single pages are held; they stay for `promise_s`. For pools whose pages do not form a chain."""
        attachment = self._attached()
        if attachment is None:
            return [False] * len(keys)
        places = [attachment.index.present(self._name, key) for key in keys]
        for key, place in zip(keys, places, strict=True):
            if place is not None and place < LOWER:
                self._promise(attachment, key, Match(1, (place,)))
        return [place is not None for place in places]

    def _promise(self, attachment: Attachment, key: str, match: Match) -> bool:
        """Hold what was found. False when the lease table is full or the page went meanwhile."""
        self._drop_promise(key)
        rows = self._session.leases.hold(match.tips, time.monotonic(), self._config.promise_s)
        if rows is None:
            self._counters["lease_table_full"] += 1
            return False
        self._promises[key] = rows
        if len(self._promises) > _MAX_PROMISES:
            self._promises.popitem(last=False)  # its rows run out by themselves
        place = attachment.index.present(self._name, key)
        return place is not None and place < LOWER

    def _drop_promise(self, key: str) -> None:
        rows = self._promises.pop(key, None)
        if rows is not None:
            self._session.leases.drop(rows)

    def _fetch(self, attachment: Attachment, keys: Sequence[str], prefix: Sequence[str]) -> int:
        """Some of these are not in RAM: how many can be had, and begin to fetch them."""
        try:
            return self._ask(attachment, keys, prefix, _FETCH_TIMEOUT_S)
        except DeadlineMissed:  # kvd is busy; whether it is stopped, the session finds out
            self._counters["miss_lookup_late"] += len(keys)
            return 0

    def _ask(self, attachment: Attachment, keys: Sequence[str], prefix: Sequence[str], timeout_s: float) -> int:
        joined, parent = _join(keys[: wire.MAX_KEYS]), _join(prefix[-1:])
        with attachment.channels.lend() as channel:
            return channel.ask(
                lambda request: wire.Lookup(
                    request, self._ns, joined, self._config.promise_s, self._wait_s(len(keys)), len(prefix), parent
                ),
                wire.Found,
                timeout_s,
            ).pages

    def _wait_s(self, pages: int) -> float:
        """How long a read of as many pages waits for a lower tier; the rest of its time is for the copies."""
        timeout_s = self._config.get_timeout_s
        return max(timeout_s / 2, timeout_s - _COPY_MARGIN_S - pages * self.spec.page_bytes / _COPY_BYTES_PER_S)

    # -- writing -------------------------------------------------------------------------------------------

    def put(
        self, keys: Sequence[str], source: PageSource, pages: Sequence[int], parent: str = "", chained: bool = True
    ) -> bool:
        """Store pages. True when kvd took all that it wanted: what it holds already or has no room for is skipped."""
        attachment = self._attached()
        if attachment is None:
            return False
        now = time.monotonic()
        if chained and self._prefill.computed(keys, parent, now):
            for name, value in self._prefill.costs().counters().items():
                self._counters[name] = value
        deadline, ttl_s = now + self._config.get_timeout_s, self._config.get_timeout_s + _MARGIN_S
        joined, parent_key = _join(keys), bytes.fromhex(parent) if parent else b""
        with attachment.channels.lend() as channel:
            reserved = channel.ask(
                lambda request: wire.ReservePages(request, self._ns, joined, ttl_s, parent_key, chained),
                wire.Reserved,
                self._config.get_timeout_s,
            )
            rows = list(wire.RESERVED_ROW.iter_unpack(reserved.rows))
            self._counters["set_pages_held"] += sum(row[2] == wire.HELD for row in rows)
            self._counters["set_pages_no_room"] += sum(row[2] == wire.NO_ROOM for row in rows)
            if not reserved.reservation:
                return True
            writes = [(page, row) for page, row in zip(pages, rows, strict=True) if row[2] == wire.WRITE]
            return self._write(attachment, channel, source, writes, reserved.reservation, deadline)

    def _write(
        self, attachment: Attachment, channel: Channel, source: PageSource,
        writes: Sequence[tuple[int, tuple[int, int, int]]], reservation: int, deadline: float,
    ) -> bool:  # fmt: skip
        """Copy, and commit a step at a time: the daemon enters one step while the next is copied."""
        length = self.spec.page_bytes
        moves = [Move(page, row[0]) for page, row in writes]
        checksums: list[bytes] = []
        told = 0

        def rows_until(end: int) -> bytes:
            pairs = zip(writes[told:end], checksums[told:end], strict=True)
            return b"".join(wire.COMMIT_ROW.pack(row[0], row[1], checksum) for (_, row), checksum in pairs if checksum)

        def progress(so_far: list[bytes]) -> None:
            nonlocal checksums, told
            if len(so_far) - told >= _COMMIT_PAGES and len(so_far) < len(moves):
                checksums = so_far
                channel.tell(wire.CommitPages(0, reservation, rows_until(len(so_far)), more=True))
                told = len(so_far)

        try:
            checksums = self._copier.store(source, attachment.arena, length, moves, deadline, progress)
        finally:
            # Whatever happened, the reservation ends here: what was not copied is given up.
            committed = channel.ask(
                lambda request: wire.CommitPages(request, reservation, rows_until(len(checksums))),
                wire.Committed,
                max(deadline - time.monotonic(), self._config.exists_timeout_s),
            )
        self._counters["set_pages"] += committed.pages
        self._counters["set_bytes"] += committed.pages * length
        return len(checksums) == len(moves)

    # -- reading -------------------------------------------------------------------------------------------

    def take(self, keys: Sequence[str], target: PageSource, pages: Sequence[int], leading: bool = True) -> list[bool]:
        """Load pages. True for each whose bytes arrived and are right; with `leading`, stops at the first miss."""
        absent = [False] * len(keys)
        attachment = self._attached()
        if attachment is None:
            return absent
        deadline = time.monotonic() + self._config.get_timeout_s
        joined, ttl_s = _join(keys), self._config.get_timeout_s + _MARGIN_S
        wait_s = self._wait_s(len(keys))
        with attachment.channels.lend() as channel:
            leased = channel.ask(
                lambda request: wire.LeasePages(request, self._ns, joined, ttl_s, wait_s),
                wire.Leased,
                self._config.get_timeout_s,
            )
            rows = list(wire.LEASED_ROW.iter_unpack(leased.rows))
            if len(rows) != len(keys) or not leased.lease:
                self._counters["miss_absent"] += len(keys)
                return absent
            return self._read(attachment, channel, target, pages, rows, leased.lease, leading, deadline)

    def _read(
        self, attachment: Attachment, channel: Channel, target: PageSource, pages: Sequence[int],
        rows: Sequence[tuple[int, int, int, bytes]], lease: int, leading: bool, deadline: float,
    ) -> list[bool]:  # fmt: skip
        length = self.spec.page_bytes
        wanted: list[int] = []  # positions among the keys
        for position, row in enumerate(rows):
            if row[2] == length:
                wanted.append(position)
            elif leading:
                break
        leased_at = {position: n for n, position in enumerate(p for p, row in enumerate(rows) if row[2])}
        moves = [Move(pages[position], rows[position][0], rows[position][3]) for position in wanted]
        arrived: list[bool] = []
        bad: list[int] = []
        try:
            arrived = self._copier.load(target, attachment.arena, length, moves, deadline)
            bad = [leased_at[position] for position, right in zip(wanted, arrived, strict=False) if not right]
        finally:
            channel.tell(wire.ReleaseLease(lease, bad))
        got = [False] * len(rows)
        for position, right in zip(wanted, arrived, strict=False):
            got[position] = right
        hits = sum(got)
        self._counters["get_pages"] += hits
        self._counters["get_bytes"] += hits * length
        self._counters["miss_corrupt"] += len(bad)
        self._counters["miss_late"] += len(moves) - len(arrived)
        self._counters["miss_absent"] += len(rows) - len(wanted)
        return got

    def settle(self, keys: Sequence[str], got: Sequence[bool]) -> None:
        """The read that a promise was for has happened: of these keys, in one or more batches."""
        self._prefill.read(keys, list(got).index(False) if False in got else len(keys), time.monotonic())
        self._drop_promise(keys[-1])


def _join(keys: Sequence[str]) -> bytes:
    return bytes.fromhex("".join(keys))
