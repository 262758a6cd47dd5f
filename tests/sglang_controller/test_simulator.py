"""The simulator itself: a right plugin passes on every release and pool, and a wrong one is caught."""

import importlib
from typing import Any

import pytest
import torch

from tests.sglang_controller import fake_sglang, keys, pools
from tests.sglang_controller.controller import (
    CONTROLLERS,
    Controller0510,
    Controller0523,
    Controller055,
    Side,
    TensorParallel,
)
from tests.sglang_controller.dict_backend import Start, chain, dict_backend
from tests.sglang_controller.releases import R0523, RELEASES

V1 = {"interface_v1": 1}
KV_POOLS = [
    (version, pool, layout)
    for version in RELEASES
    for pool, layouts in (
        (pools.MHATokenToKVPoolHost, pools.MHA_LAYOUTS[version]),
        (pools.MLATokenToKVPoolHost, pools.MLA_LAYOUTS),
    )
    for layout in layouts
]


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize(("version", "pool_class", "layout"), KV_POOLS)
def test_pages_come_back_as_they_were(
    start: Start, version: str, pool_class: Any, layout: str, zero_copy: bool
) -> None:
    pool = pool_class(release=version, layout=layout)
    controller = start(version, pool, extra_config=V1 if zero_copy else {})
    stored, back, spare = list(range(5)), [20, 9, 8, 33, 41], 17
    written = pools.fill_pages(pool, stored)
    assert controller.backup(chain(5, pool), pools.page_slots(pool, stored)) == 5

    span = chain(6, pool)
    assert controller.prefetch(span, pools.page_slots(pool, [*back, spare])) == 5
    assert pools.same_pages(pool, back, written)
    assert controller.errors == []
    v1 = zero_copy and version != "0.5.5"
    assert ("batch_get_v1" in controller.recorder.methods("IO")) == v1
    assert ("batch_get" in controller.recorder.methods("IO")) != v1


@pytest.mark.parametrize("version", RELEASES)
def test_config_and_registrations_are_those_of_the_release(start: Start, version: str) -> None:
    controller = start(version)
    seen = {
        "0.5.5": ["register_mem_pool_host"],
        "0.5.10": ["register_mem_pool_host"],
        "0.5.23": ["register_mem_pool_host", "register_mem_host_pool_v2", "on_host_pools_registered"],
    }
    assert controller.recorder.methods("S") == seen[version]
    assert hasattr(controller.config, "pp_rank") == (version != "0.5.5")
    assert hasattr(controller.config, "dp_rank") == (version == "0.5.23")
    assert "prefetch_threshold" not in controller.config.extra_config
    assert controller.config.extra_config["backend_name"] == "sim"


@pytest.mark.parametrize("version", RELEASES)
def test_calls_are_split_as_the_release_splits_them(start: Start, version: str) -> None:
    pool = pools.MHATokenToKVPoolHost(release=version, page_size=1, page_num=600)
    controller = start(version, pool, extra_config=V1)
    span, slots = chain(300, pool), pools.page_slots(pool, list(range(300)))
    assert controller.backup(span, slots) == 300
    assert controller.prefetch(span, slots) == 300
    sizes = {
        m: [len(c.args[0]) for c in controller.recorder.calls if c.method == m]
        for m in ("batch_exists", "batch_get_v1", "batch_get", "batch_set", "batch_set_v1")
    }
    assert sizes["batch_exists"] == ([300] if version == "0.5.23" else [128, 128, 44])
    assert sizes["batch_get_v1"] + sizes["batch_get"] == [128, 128, 44]
    assert sizes["batch_set_v1"] + sizes["batch_set"] == [128, 128, 44]
    for call in controller.recorder.calls:
        if call.method in ("batch_get_v1", "batch_set_v1"):
            assert call.args[1].dtype == torch.int64
            assert call.args[1].device.type == "cpu"


@pytest.mark.parametrize("version", RELEASES)
def test_prefix_keys_are_passed_only_when_asked_for(start: Start, version: str) -> None:
    pool = pools.MHATokenToKVPoolHost(release=version, page_size=1, page_num=400)
    span, slots = chain(200, pool), pools.page_slots(pool, list(range(200)))
    for wanted in (False, True):
        controller = start(version, pool, extra_config={**V1, "hicache_storage_pass_prefix_keys": wanted})
        controller.backup(span[10:], slots[10:], prefix_keys=span[:10])
        controller.prefetch(span[10:], slots[10:], prefix_keys=span[:10])
        given = [c.args[1].prefix_keys for c in controller.recorder.calls if c.method == "batch_exists"]
        if not wanted:
            assert set(map(type, given)) == {type(None)}
        elif version == "0.5.23":
            assert given == [span[:10]]
        else:  # one list, grown in place between the calls: the first call's prefix is not what it was
            assert given[0] is given[1]
            assert given[0] == span


@pytest.mark.parametrize("version", RELEASES)
def test_a_hit_below_the_threshold_reads_nothing(start: Start, version: str) -> None:
    controller = start(version, prefetch_threshold=5 * 4)
    span = chain(4, controller.pool)
    slots = pools.page_slots(controller.pool, [0, 1, 2, 3])
    controller.backup(span, slots)
    assert controller.prefetch(span, slots) == 0
    assert controller.recorder.methods("IO") == []


@pytest.mark.parametrize("version", ["0.5.10", "0.5.23"])
def test_a_hybrid_model_gets_its_state_back(start: Start, version: str) -> None:
    kv = pools.MHATokenToKVPoolHost(release=version)
    mamba = pools.MambaPoolHost(release=version)
    controller = start(version, kv, side_pools={"mamba": mamba}, extra_config=V1)
    span, state = chain(4, kv), pools.fill_pages(mamba, [3], seed=7)
    pages = pools.fill_pages(kv, [0, 1, 2, 3])
    side = Side("mamba", pools.page_slots(mamba, [3]))
    assert controller.backup(span, pools.page_slots(kv, [0, 1, 2, 3]), sides=[side]) == 4

    longer = [*span, *chain(2, kv, seed=1000)]
    back = Side("mamba", pools.page_slots(mamba, [11]))
    operation = controller.start_prefetch(longer, pools.page_slots(kv, [9, 8, 7, 6, 5, 4]), sides=[back])
    assert controller.wait_prefetch(operation) == 4
    assert operation.pool_hits == {"mamba": 1}
    assert pools.same_pages(kv, [9, 8, 7, 6], pages)
    assert pools.same_pages(mamba, [11], state)
    assert controller.errors == []
    order = ["batch_get_v2", "batch_get_v1"]
    assert controller.recorder.methods("IO") == (order if version == "0.5.10" else order[::-1])
    assert controller.recorder.methods("B") == ["batch_set_v2", "batch_set_v1"]


def test_a_window_that_is_not_there_shortens_the_hit(start: Start) -> None:
    kv = pools.MHATokenToKVPoolHost()
    swa = pools.MHATokenToKVPoolHost(layer_num=1)
    controller = start("0.5.23", kv, side_pools={"swa": swa}, extra_config=V1)
    span, slots = chain(6, kv), pools.page_slots(kv, list(range(6)))
    controller.backup(span[:4], slots[:16], sides=[Side("swa", pools.page_slots(swa, [0, 1]), window=2)])
    controller.backup(span[4:], slots[16:])  # no window here: a prefix of five or six is not restorable
    operation = controller.start_prefetch(span, slots, sides=[Side("swa", pools.page_slots(swa, [4, 5]), window=2)])
    assert controller.wait_prefetch(operation) == 4
    assert operation.restorable == [4]
    assert operation.pool_hits == {"swa": 2}
    assert controller.errors == []


def test_an_anchor_without_bytes_works_through_its_side_pools(start: Start) -> None:
    anchor = pools.LogicalHostPool()
    compressed = pools.MLATokenToKVPoolHost(page_num=64)
    controller = start("0.5.23", anchor, side_pools={"deepseek_v4_c4": compressed}, extra_config=V1)
    span, slots = chain(3, anchor), pools.page_slots(anchor, [0, 1, 2])
    written = pools.fill_pages(compressed, [0, 1, 2])
    derived = [Side.kv_derived("deepseek_v4_c4")]
    assert controller.backup(span, slots, sides=derived) == 3
    pools.wipe_pages(compressed, [0, 1, 2])
    assert controller.prefetch([*span, "0" * 64], pools.page_slots(anchor, [0, 1, 2, 3]), sides=derived) == 3
    assert pools.same_pages(compressed, [0, 1, 2], written)
    assert controller.errors == []


@pytest.mark.parametrize("version", RELEASES)
def test_ranks_use_only_what_all_of_them_have(version: str) -> None:
    ranks = [pools.MHATokenToKVPoolHost(release=version) for _ in range(3)]
    backend = dict_backend(RELEASES[version])
    group = TensorParallel.build(CONTROLLERS[version], backend, ranks, extra_config=V1).attach()
    span, slots = chain(6, ranks[0]), [pools.page_slots(pool, list(range(6))) for pool in ranks]
    assert group.backup(span, slots) == [6, 6, 6]
    del backend.store["kv", span[4], 1]
    assert group.prefetch(span, slots) == 4
    assert group.errors == []
    assert group.detach()


@pytest.mark.parametrize("version", RELEASES)
def test_one_rank_writes_what_all_ranks_replicate(version: str) -> None:
    ranks = [pools.MLATokenToKVPoolHost(release=version) for _ in range(2)]
    group = TensorParallel.build(CONTROLLERS[version], dict_backend(RELEASES[version]), ranks).attach()
    span, slots = chain(3, ranks[0]), [pools.page_slots(pool, [0, 1, 2]) for pool in ranks]
    assert group.backup(span, slots) == [3, 0]
    assert group.prefetch(span, slots) == 3
    assert group.errors == []
    assert group.detach()


def test_sharded_state_is_written_by_every_rank_of_a_replicated_model() -> None:
    ranks = [pools.MLATokenToKVPoolHost() for _ in range(2)]
    states = [{"mamba": pools.MambaPoolHost()} for _ in range(2)]
    backend = dict_backend(R0523)
    group = TensorParallel.build(Controller0523, backend, ranks, side_pools=states, extra_config=V1).attach()
    span, slots = chain(2, ranks[0]), [pools.page_slots(pool, [0, 1]) for pool in ranks]
    assert group.backup(span, slots, sides=[Side("mamba", torch.tensor([0]))]) == [2, 2]
    assert sorted(where[2] for where in backend.store if where[0] == "mamba") == [0, 1]
    assert group.errors == []
    assert group.detach()


def test_a_known_span_is_read_without_asking(start: Start) -> None:
    controller = start("0.5.23", extra_config=V1)
    span, slots = chain(3, controller.pool), pools.page_slots(controller.pool, [0, 1, 2])
    controller.backup(span[:2], slots[:8])
    assert controller.prefetch(span, slots, assume_stored=True) == 2
    assert "batch_exists" not in controller.recorder.methods()


def test_keys_match_the_known_answers() -> None:
    plain = keys.page_keys(range(1, 9), 4)
    assert plain[0] == "cf97adeedb59e05bfd73a2b4c2a8885708c4f4f70c84c64b27120e72ab733b72"
    assert plain[1] == "4ebfa8a1f3c341517621838c6e1b9aa350307e3f00b3cbd1a07ef740f54396d6"
    assert keys.event_hash(plain[0]) == -3488128144981237669
    salted = keys.page_keys(range(1, 9), 4, cache_salt="s1")
    assert salted[1] == "161a75cf944104c06eeb9e5442f129f9b0c487b8043aec4da99edf698fc767cf"
    assert keys.page_keys([5, 6, 7, 8], 4, prior=plain[0])[0] == plain[1]


@pytest.mark.parametrize(
    "pool",
    [
        pools.MHATokenToKVPoolHost(allocator="shm"),
        pools.MLATokenToKVPoolHost(allocator="shm"),
    ],
)
def test_a_shared_pool_is_readable_through_its_fd(pool: Any) -> None:
    [page] = pools.fill_pages(pool, [3])
    pointers, sizes = pool.get_page_buffer_meta(pools.page_slots(pool, [3]))
    base = pool.kv_buffer.data_ptr()
    with open(f"/proc/self/fd/{pool.fd}", "rb") as file:
        seen = b""
        for pointer, size in zip(pointers, sizes, strict=True):
            file.seek(pointer - base)
            seen += file.read(size)
    assert seen == page


def test_heads_split_a_page_into_equal_parts() -> None:
    pool = pools.MHATokenToKVPoolHost(layout="page_head", head_num=4)
    whole = pool.get_page_buffer_meta(pools.page_slots(pool, [2, 5]))
    split = pool.get_split_heads_page_buffer_meta(pools.page_slots(pool, [2, 5]), 2)
    assert len(split[0]) == 2 * len(whole[0])
    assert sum(split[1]) == sum(whole[1])
    assert split[0][:2] == whole[0][:2]


@pytest.mark.parametrize("version", RELEASES)
def test_the_fake_package_has_only_what_the_release_had(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release = RELEASES[version]
    args = fake_sglang.server_args(model_path="/models/x")
    fake_sglang.install_fake_sglang(monkeypatch, release, args)
    storage = importlib.import_module("sglang.srt.mem_cache.hicache_storage")
    assert importlib.import_module("sglang").__version__ == version
    assert hasattr(storage, "PoolTransferResult") == (version != "0.5.5")
    assert importlib.import_module(release.metrics_module).StorageMetrics().prefetch_pgs == []
    if version == "0.5.23":
        assert importlib.import_module("sglang.srt.runtime_context").get_server_args().model_path == "/models/x"
        with pytest.raises(RuntimeError):
            importlib.import_module("sglang.srt.server_args").get_global_server_args()
    else:
        assert importlib.import_module("sglang.srt.server_args").get_global_server_args() is args
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("sglang.srt.runtime_context")
    with pytest.raises(TypeError):
        fake_sglang.load_backend_class("tests.sglang_controller.dict_backend", "DictStorage")


def test_the_controllers_are_the_releases_own() -> None:
    assert [c.release.version for c in (Controller055, Controller0510, Controller0523)] == list(RELEASES)
