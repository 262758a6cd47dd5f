"""Wrong plugins are caught, and each release suffers from them in its own way."""

import threading
import time
from typing import Any

import pytest

from tests.sglang_controller import pools
from tests.sglang_controller.controller import AttachFailed
from tests.sglang_controller.dict_backend import DictStorage, Start, chain
from tests.sglang_controller.releases import RELEASES

V1 = {"interface_v1": 1}


class Short(DictStorage):
    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        return super().batch_get_v1(keys, host_indices)[:-1]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        return super().batch_get(keys, target_locations)[:-1]


class Nothing(DictStorage):
    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> Any:
        return None

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> Any:
        return None


class Raising(DictStorage):
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        raise ConnectionError("no daemon")


@pytest.mark.parametrize("version", RELEASES)
def test_a_short_list_is_caught(start: Start, version: str) -> None:
    controller = start(version, base=Short, extra_config=V1)
    span, slots = chain(3, controller.pool), pools.page_slots(controller.pool, [0, 1, 2])
    controller.backup(span, slots)
    assert controller.prefetch(span, slots) in (0, 2)
    assert {"contract", "broke"} <= {failure.kind for failure in controller.errors}
    assert ("IO" in controller.dead) == (version != "0.5.23")


@pytest.mark.parametrize("version", RELEASES)
def test_none_for_an_answer_is_caught(start: Start, version: str) -> None:
    controller = start(version, base=Nothing, extra_config=V1)
    span, slots = chain(3, controller.pool), pools.page_slots(controller.pool, [0, 1, 2])
    controller.backup(span, slots)
    assert controller.prefetch(span, slots) == 0
    assert ("P" in controller.dead) == (version != "0.5.23")
    assert ("B" in controller.dead) == (version == "0.5.10")
    assert "broke" in {failure.kind for failure in controller.errors if failure.role == "P"}


@pytest.mark.parametrize("version", RELEASES)
def test_an_exception_is_caught_and_ends_the_thread_where_it_would(start: Start, version: str) -> None:
    controller = start(version, base=Raising)
    span, slots = chain(3, controller.pool), pools.page_slots(controller.pool, [0, 1, 2])
    assert controller.prefetch(span, slots) == 0
    assert controller.errors[0].kind == "raised"
    assert controller.errors[0].method == "batch_exists"
    assert ("P" in controller.dead) == (version != "0.5.23")
    assert controller.reset()
    assert not controller.dead


@pytest.mark.parametrize("version", RELEASES)
def test_a_call_that_hangs_fails_the_flush_and_the_detach(start: Start, version: str) -> None:
    free = threading.Event()

    class Hanging(DictStorage):
        def batch_set(self, keys: list[str], values: Any = None, *_: Any) -> bool:
            return free.wait(20)

    controller = start(version, base=Hanging, join_timeout_s=0.2)
    operation = controller.start_backup(chain(1, controller.pool), pools.page_slots(controller.pool, [0]))
    while controller.backup_queue.qsize():
        time.sleep(0.001)
    assert not controller.reset()
    assert [failure.kind for failure in controller.errors] == ["stuck"]
    free.set()
    controller.wait_backup(operation)


def test_a_plugin_that_fails_its_registration_fails_the_attach(start: Start) -> None:
    class Refusing(DictStorage):
        def register_mem_pool_host(self, mem_pool_host: Any) -> None:
            raise OSError("no socket")

    for version in RELEASES:
        with pytest.raises(AttachFailed):
            start(version, base=Refusing)


@pytest.mark.parametrize("version", RELEASES)
def test_stats_must_be_the_collectors_own_class(start: Start, version: str) -> None:
    class Wrong(DictStorage):
        def get_stats(self) -> Any:
            return {"prefetch_pgs": []}

    start(version).get_stats()
    with pytest.raises((AssertionError, AttributeError)):
        start(version, base=Wrong).get_stats()


@pytest.mark.parametrize("version", RELEASES)
def test_clear_and_close_are_called_where_the_release_calls_them(start: Start, version: str) -> None:
    controller = start(version)
    assert controller.clear()
    assert controller.detach()
    assert ("close" in controller.recorder.methods()) == (version != "0.5.5")


def test_the_old_release_gives_unread_pages_back_twice(start: Start) -> None:
    class Forgetful(DictStorage):
        def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
            return [None] * len(keys)

    for version, times in (("0.5.5", 2), ("0.5.10", 1), ("0.5.23", 1)):
        controller = start(version, base=Forgetful)
        span, slots = chain(2, controller.pool), pools.page_slots(controller.pool, [5, 6])
        controller.backup(span, slots)
        assert controller.prefetch(span, slots) == 0
        assert sorted(controller.released) == sorted([5, 6] * times)


def test_a_terminated_read_counts_for_nothing(start: Start) -> None:
    begun, free = threading.Event(), threading.Event()

    class Slow(DictStorage):
        def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
            begun.set()
            free.wait(20)
            return super().batch_get_v1(keys, host_indices)

    controller = start("0.5.10", base=Slow, extra_config=V1)
    span, slots = chain(2, controller.pool), pools.page_slots(controller.pool, [5, 6])
    controller.backup(span, slots)
    operation = controller.start_prefetch(span, slots)
    assert begun.wait(20)
    operation.mark_terminate()
    assert controller.released == []  # the pages are the plugin's until its call returns
    free.set()
    assert controller.wait_prefetch(operation) == 0
    assert sorted(controller.released) == [5, 6]
