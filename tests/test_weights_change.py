"""Weights that are replaced while a worker runs: no page of the old ones is given back, and the cache goes on."""

import time
from collections.abc import Iterator

import pytest

from kvd.daemon.requests import MAX_NAMESPACES
from kvd.sidecar import shelves, weightwatch
from tests.harness import Daemon, eventually, span
from tests.plugin_process import Worker


@pytest.fixture
def worker(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """The plugin in this process, where updates can be made to happen."""
    monkeypatch.setattr(weightwatch, "_updates", 0)
    worker = Worker(str(daemon.socket))
    yield worker
    worker.plugin.close()


def test_pages_of_weights_that_are_being_replaced_are_nobodys(worker: Worker) -> None:
    """SGLang flushes what it holds when an update ends; until then writes of older pages may still come."""
    keys = span(4)
    assert worker.wait()
    assert worker.put(keys) == [True] * 4

    def update() -> None:
        assert worker.plugin.batch_exists(keys) == 0
        time.sleep(0.1)  # the session's thread has looked at it
        assert not worker.plugin.ready
        assert worker.put(keys) == [False] * 4

    weightwatch.update(update)
    assert worker.plugin.batch_exists(keys) == 0
    eventually(lambda: worker.plugin.ready, 10)
    assert worker.plugin.batch_exists(keys) == 0
    assert worker.put(keys) == [True] * 4
    assert worker.take(keys) == ["right"] * 4


def test_weights_may_change_more_often_than_a_session_takes_namespaces(worker: Worker) -> None:
    keys = span(4)
    for _ in range(MAX_NAMESPACES // 2 + 2):  # pieces and flat pages have a namespace each
        eventually(lambda: worker.plugin.ready, 10)
        weightwatch.update(lambda: None)
        assert worker.plugin.batch_exists(keys) == 0
    eventually(lambda: worker.plugin.ready, 10)
    assert worker.put(keys) == [True] * 4
    assert worker.take(keys) == ["right"] * 4
    assert worker.plugin.stats()["attached"] > 1


def test_a_shelf_that_is_still_in_use_never_takes_its_successors_number(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that began before the session started over holds the old shelf; its number is another namespace's now."""
    monkeypatch.setattr(shelves, "_MOST_SPECS", 2)
    keys = span(4)
    assert worker.wait()
    assert worker.put(keys) == [True] * 4
    old = worker.plugin._shelf("kv")
    assert old is not None
    assert old.has(keys) == 4
    weightwatch.update(lambda: None)
    eventually(lambda: worker.plugin.ready, 10)
    new = worker.plugin._shelf("kv")
    assert new is not None
    assert new._ns == old._ns
    view = worker.plugin._view("kv")
    assert view is not None
    assert old.has(keys) == 0
    assert old.take(keys, view, range(4)) == [False] * 4
    assert not old.put(span(4, conversation=1), view, range(4))
    assert new.has(span(4, conversation=1)) == 0
    assert worker.put(keys) == [True] * 4
    assert worker.take(keys) == ["right"] * 4
