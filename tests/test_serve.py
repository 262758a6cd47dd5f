"""What the process of a lower tier tells kvd: what came and left, in that order, and what it may not remove."""

import mmap
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvd.storage import tierwire
from kvd.storage.nvme import NvmeTier
from kvd.storage.serve import Server
from kvd.storage.tier import Buffers, Name, News, Page
from tests.shared_folder import PollingTier
from tests.tier_samples import get, put, sample

ONE = sample(1)
ROW = tierwire.Row.of(ONE.page, [0])
STORE, REMOVE = tierwire.Store(1, [ROW]), tierwire.Remove(1, ONE.page.namespace, ONE.page.key)


class Watched(PollingTier):
    """`taken` is called when news has left it, `asked` when it is asked to change something."""

    def __init__(self, folder: Path, node: str) -> None:
        super().__init__(str(folder), node, 1 << 24, poll_s=0)
        self.taken: Callable[[], None] = lambda: None
        self.asked: Callable[[], None] = lambda: None

    def news(self) -> News:
        found, then = super().news(), self.taken
        self.taken = lambda: None
        then()
        return found

    def put(self, pages: Sequence[tuple[Page, Buffers]]) -> list[bool]:
        self.asked()
        return super().put(pages)

    def remove(self, names: Sequence[Name]) -> None:
        self.asked()
        super().remove(names)


class Turnstile:
    """A lock that says when somebody waits for it."""

    def __init__(self, waits: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._waits = waits

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._waits()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[tuple[Watched, Watched]]:
    ours, others = Watched(tmp_path / "shared", "a"), Watched(tmp_path / "shared", "b")
    yield ours, others
    ours.close()
    others.close()


def believed(frames: bytes) -> set[Name]:
    """What kvd thinks is held, of what it was told from the beginning on."""
    inbox, held = bytearray(frames), set[Name]()
    while body := tierwire.take_frame(inbox):
        match tierwire.decode_from_tier(body):
            case tierwire.Changed(came, left):
                held = (held | set(tierwire.split(came))) - set(tierwire.split(left))
            case tierwire.Stored(_, flags):
                held |= {ONE.page.name} if all(flags) else set()
            case tierwire.Removed(_, names, _):
                held -= set(tierwire.split(names))
    return held


def test_a_disk_too_full_to_remove_from_is_said_and_the_tier_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = NvmeTier(tmp_path / "tier", 4 << 20, 2 << 20)
    put(tier, ONE)
    monkeypatch.setattr(tier._catalog, "commit", lambda *_: False)  # as it says of a full disk
    kvd, theirs = socket.socketpair()
    with kvd, theirs:
        Server(tier, theirs, memoryview(b""), 1).do(REMOVE)
        body = tierwire.take_frame(bytearray(kvd.recv(1 << 16)))
    assert body is not None
    trouble = "the disk is too full to remove (make room on it)"
    assert tierwire.decode_from_tier(body) == tierwire.Removed(1, b"", True, trouble)
    assert get(tier, ONE) == [ONE]
    tier.close()


@pytest.mark.parametrize("request_", [STORE, REMOVE], ids=["stored", "removed"])
def test_news_that_is_taken_is_told_before_what_is_done_next(
    tiers: tuple[Watched, Watched], request_: tierwire.ToTier
) -> None:
    """kvd asks for the opposite of the news just when that was taken, and not told yet."""
    ours, others = tiers
    put(others, ONE)
    if request_ is STORE:
        ours.news()
        others.remove([ONE.page.name])
    kvd, theirs = socket.socketpair()
    arena = memoryview(mmap.mmap(-1, 8192))
    arena[: len(ONE.data[0])] = ONE.data[0]
    server = Server(ours, theirs, arena, 1)
    begun, waits = threading.Event(), threading.Event()
    server._telling = Turnstile(lambda: (waits.set(), begun.set()))  # type: ignore[assignment, func-returns-value]
    ours.asked = begun.set
    store = threading.Thread(target=server.do, args=(request_,))

    def meanwhile() -> None:
        store.start()
        begun.wait()
        if not waits.is_set():  # nothing keeps it: let it tell first
            store.join()

    ours.taken = meanwhile
    with kvd, theirs:
        server.tend()
        store.join()
        theirs.shutdown(socket.SHUT_WR)
        told = b"".join(iter(lambda: kvd.recv(1 << 16), b""))
    there = {name for piece in ours.names() for name in piece}
    assert believed(told) == there == ({ONE.page.name} if request_ is STORE else set())
