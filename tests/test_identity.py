"""Which part of a page a rank holds, and when a worker's weights stop being what they were."""

from types import SimpleNamespace

import pytest

from kvd.errors import Unsupported
from kvd.sidecar import weightwatch
from kvd.sidecar.identity import Rank


def rank(nodes: int = 1, **config: object) -> Rank:
    return Rank.of(SimpleNamespace(**config), nodes)


def test_ranks_of_one_machine_make_a_page_together() -> None:
    assert rank(tp_rank=3, tp_size=8).shard("kv") == (3, 8)
    assert rank(tp_rank=3, tp_size=8).slice("kv") == (0, 8)


def test_ranks_of_other_machines_are_other_machines_business() -> None:
    """Sixteen ranks on two machines: each kvd sees eight, and they are not the same eight."""
    low, high = rank(2, tp_rank=3, tp_size=16), rank(2, tp_rank=11, tp_size=16)
    assert low.shard("kv") == high.shard("kv") == (3, 8)
    assert (low.slice("kv"), high.slice("kv")) == ((0, 16), (8, 16))


def test_pipeline_stages_on_other_machines_leave_the_tensor_group_whole() -> None:
    assert rank(2, tp_rank=3, tp_size=8, pp_rank=1, pp_size=2).shard("kv") == (3, 8)


def test_replicated_pages_are_stored_once_but_states_per_rank() -> None:
    mla = rank(tp_rank=3, tp_size=8, is_mla_model=True)
    assert mla.shard("kv") == (0, 1)
    assert mla.shard("mamba") == (3, 8)


def test_an_old_release_that_says_little_is_one_rank() -> None:
    assert rank().shard("kv") == (0, 1)


def test_decode_context_parallelism_is_refused() -> None:
    with pytest.raises(Unsupported, match="decode context"):
        rank(dcp_size=2)


def test_an_online_update_changes_the_name_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weightwatch, "_updates", 0)
    assert weightwatch.epoch() == ""
    seen: list[tuple[bool, str]] = []

    def update(*given: int) -> tuple[int, ...]:
        seen.append((weightwatch.running(), weightwatch.epoch()))
        return given

    assert weightwatch.update(update, 1, 2) == (1, 2)
    first = weightwatch.epoch()
    assert seen == [(True, first)]
    assert not weightwatch.running()
    assert first
    assert weightwatch.epoch() == first, "ranks of one worker agree"
    with pytest.raises(ZeroDivisionError):
        weightwatch.update(lambda: 1 // 0)
    assert weightwatch.epoch() != first, "an update that failed may have changed some of them"
    assert not weightwatch.running()
