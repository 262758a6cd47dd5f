"""The plugin, driven as each release's cache controller drives it, against a real daemon."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness import Daemon, eventually
from tests.sglang_controller import fake_sglang, pools
from tests.sglang_controller.controller import CONTROLLERS, Controller, Controller0523, Side, TensorParallel
from tests.sglang_controller.keys import page_keys
from tests.sglang_controller.releases import RELEASES

Attach = Callable[..., Controller]
KV_POOLS = [
    (version, pool, layout)
    for version in RELEASES
    for pool, layouts in (
        (pools.MHATokenToKVPoolHost, pools.MHA_LAYOUTS[version]),
        (pools.MLATokenToKVPoolHost, pools.MLA_LAYOUTS),
    )
    for layout in layouts
]


def span(pages: int, page_size: int = 4, first: int = 0) -> list[str]:
    return page_keys(list(range(first, first + pages * page_size)), page_size)


def options(daemon: Daemon, **kvd: Any) -> dict[str, Any]:
    settings = {"socket": str(daemon.socket), "weights_id": "w"} | kvd
    return {"interface_v1": 1, "hicache_storage_pass_prefix_keys": True, "kvd": settings}


@pytest.fixture
def attach(daemon: Daemon) -> Iterator[Attach]:
    """Attach the plugin under a release's controller, wait until it is ready, and let it go at the end."""
    running: list[Controller] = []
    backends: list[Any] = []
    contexts: list[Any] = []

    def start(
        version: str, pool: Any = None, ready: bool = True, extra: Any = None, launched: Any = None, **config: Any
    ) -> Controller:
        launched = {"model_path": ""} | (launched or {})
        context = fake_sglang.fake_sglang(RELEASES[version], fake_sglang.server_args(**launched))
        context.__enter__()
        contexts.append(context)
        backend = fake_sglang.load_backend_class("kvd.sidecar.hicache", "KvdStorage", forget=("kvd.sidecar",))
        pool = pool if pool is not None else pools.MHATokenToKVPoolHost(release=version)
        controller = CONTROLLERS[version](backend, pool, extra_config=extra or options(daemon), **config)
        running.append(controller)
        controller.attach()
        backends.append(controller.backend)
        if ready:
            eventually(lambda: controller.backend.ready, 10, "the plugin is attached")
        return controller

    yield start
    for controller in running:
        controller.detach()
    for backend in backends:
        backend.close()
    for context in reversed(contexts):
        context.__exit__(None, None, None)


@pytest.mark.parametrize(("version", "pool_class", "layout"), KV_POOLS)
def test_pages_come_back_as_they_were(
    attach: Attach, daemon: Daemon, version: str, pool_class: Any, layout: str
) -> None:
    pool = pool_class(release=version, layout=layout)
    controller = attach(version, pool)
    stored, back = list(range(5)), [20, 9, 8, 33, 41]
    written = pools.fill_pages(pool, stored)
    assert controller.backup(span(5), pools.page_slots(pool, stored)) == 5
    assert controller.prefetch(span(6), pools.page_slots(pool, [*back, 17])) == 5
    assert pools.same_pages(pool, back, written)
    assert controller.errors == []
    assert daemon.faults() == []


@pytest.mark.parametrize("version", RELEASES)
def test_a_worker_started_before_kvd_serves_and_attaches_later(attach: Attach, daemon: Daemon, version: str) -> None:
    daemon.stop()
    controller = attach(version, ready=False)
    slots = pools.page_slots(controller.pool, [0, 1, 2])
    pools.fill_pages(controller.pool, [0, 1, 2])
    assert controller.prefetch(span(3), slots) == 0
    controller.backup(span(3), slots)
    daemon.start()
    eventually(lambda: controller.backend.ready, 10)
    assert controller.backup(span(3), slots) == 3
    assert controller.prefetch(span(3), slots) == 3
    assert not controller.dead
    assert [f for f in controller.errors if f.kind != "contract"] == []


@pytest.mark.parametrize("version", RELEASES)
def test_clear_flush_and_detach_leave_the_pages_to_others(attach: Attach, daemon: Daemon, version: str) -> None:
    extra = options(daemon)
    if version == "0.5.5":
        del extra["interface_v1"]  # as the README says for releases that ignore it
    controller = attach(version, extra=extra)
    slots = pools.page_slots(controller.pool, [0, 1, 2])
    written = pools.fill_pages(controller.pool, [0, 1, 2])
    controller.backup(span(3), slots)
    controller.clear()
    controller.reset()
    assert controller.prefetch(span(3), slots) == 3
    controller.detach()
    other = attach(version, extra=extra)
    assert other.prefetch(span(3), pools.page_slots(other.pool, [4, 5, 6])) == 3
    assert pools.same_pages(other.pool, [4, 5, 6], written)
    assert other.errors == []


def test_long_prompts_are_looked_up_whole_and_moved_in_batches(attach: Attach) -> None:
    pool = pools.MHATokenToKVPoolHost(page_size=1, page_num=1200)
    controller = attach("0.5.23", pool)
    keys, half = span(600, 1), list(range(600))
    written = pools.fill_pages(pool, half)
    assert controller.backup(keys, pools.page_slots(pool, half)) == 600
    back = list(range(600, 1200))
    assert controller.prefetch(keys, pools.page_slots(pool, back)) == 600
    assert pools.same_pages(pool, back, written)
    assert [len(c.args[0]) for c in controller.recorder.calls if c.method == "batch_exists"] == [600]


def test_a_continued_conversation_is_one_chain(attach: Attach, daemon: Daemon) -> None:
    controller = attach("0.5.23")
    keys = span(9)
    pools.fill_pages(controller.pool, list(range(9)))
    controller.backup(keys[:4], pools.page_slots(controller.pool, [0, 1, 2, 3]), prefix_keys=[])
    controller.backup(keys[4:], pools.page_slots(controller.pool, [4, 5, 6, 7, 8]), prefix_keys=keys[:4])
    assert controller.prefetch(keys, pools.page_slots(controller.pool, list(range(20, 29)))) == 9
    link = daemon.tool()
    try:
        from kvd import wire

        held = link.ask(wire.GetPrefixes(), wire.Prefixes, 5.0)
    finally:
        link.close()
    assert [(p.pages, p.tokens, p.key) for p in held.prefixes] == [(9, 36, keys[-1])]


def test_metrics_are_sglangs_own_record(attach: Attach) -> None:
    controller = attach("0.5.23")
    slots = pools.page_slots(controller.pool, [0, 1, 2])
    controller.backup(span(3), slots)
    controller.prefetch(span(3), slots)
    stats = controller.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [3])
    assert all(speed > 0 for speed in stats.backup_bandwidth + stats.prefetch_bandwidth)
    assert controller.get_stats().prefetch_pgs == []


# -- identity ----------------------------------------------------------------------------------------------------


def test_two_workers_of_one_model_share(attach: Attach) -> None:
    first, second = attach("0.5.23"), attach("0.5.23")
    written = pools.fill_pages(first.pool, [0, 1, 2])
    first.backup(span(3), pools.page_slots(first.pool, [0, 1, 2]))
    assert second.prefetch(span(3), pools.page_slots(second.pool, [5, 6, 7])) == 3
    assert pools.same_pages(second.pool, [5, 6, 7], written)


def _differences() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    import torch

    return [
        ("weights", {"weights_id": "other revision"}, {}),
        ("tenant", {"tenant": "b"}, {}),
        ("dtype", {}, {"dtype": torch.float16}),
        ("layout", {}, {"layout": "page_first_direct"}),
        ("page size", {}, {"page_size": 8}),
        ("heads", {}, {"head_num": 4, "head_dim": 4}),
        ("layers", {}, {"layer_num": 2}),
    ]


@pytest.mark.parametrize(("what", "kvd", "geometry"), _differences())
def test_what_differs_in_anything_never_shares(
    attach: Attach, daemon: Daemon, what: str, kvd: dict[str, Any], geometry: dict[str, Any]
) -> None:
    first = attach("0.5.23")
    pools.fill_pages(first.pool, [0, 1, 2])
    first.backup(span(3), pools.page_slots(first.pool, [0, 1, 2]))
    pool = pools.MHATokenToKVPoolHost(**geometry)
    second = attach("0.5.23", pool, extra=options(daemon, **kvd))
    assert second.prefetch(span(3), pools.page_slots(pool, [0, 1, 2])) == 0, what


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, {"kv_cache_dtype": "fp8_e4m3"}),  # the host pool says uint8 of both
        ({}, {"quantization_param_path": "scales.json"}),
        ({"lora_paths": ["a=/x"]}, {"lora_paths": ["a=/y"]}),
    ],
)
def test_workers_that_were_launched_otherwise_never_share(
    attach: Attach, mine: dict[str, Any], others: dict[str, Any]
) -> None:
    import torch

    one, two, three = (pools.MHATokenToKVPoolHost(dtype=torch.uint8) for _ in range(3))
    first = attach("0.5.23", one, launched=mine)
    written = pools.fill_pages(one, [0, 1, 2])
    first.backup(span(3), pools.page_slots(one, [0, 1, 2]))
    assert attach("0.5.23", two, launched=others).prefetch(span(3), pools.page_slots(two, [0, 1, 2])) == 0
    assert attach("0.5.23", three, launched=mine).prefetch(span(3), pools.page_slots(three, [0, 1, 2])) == 3
    assert pools.same_pages(three, [0, 1, 2], written)


def test_adapters_need_keys_that_tell_them_apart_whatever_the_weights_are_called(attach: Attach) -> None:
    controller = attach("0.5.10", ready=False, launched={"enable_lora": True})
    eventually(lambda: controller.backend.circuit.startswith("off"), 5)
    assert "LoRA" in controller.backend.circuit


def test_flat_pages_and_pieces_never_share(attach: Attach, daemon: Daemon) -> None:
    """layer_first flattens K before V but lists them in turns: same bytes, another order."""
    pool = pools.MHATokenToKVPoolHost(layout="layer_first")
    pieces = attach("0.5.23", pool)
    pools.fill_pages(pool, [0, 1])
    pieces.backup(span(2), pools.page_slots(pool, [0, 1]))
    other = pools.MHATokenToKVPoolHost(layout="layer_first")
    flat = attach("0.5.23", other, extra={"kvd": options(daemon)["kvd"]})
    assert flat.prefetch(span(2), pools.page_slots(other, [0, 1])) == 0


@pytest.mark.parametrize(
    ("extra", "config", "why"),
    [
        ({"kvd": {"sokcet": "x"}}, {}, "sokcet"),
        ({"kvd": {"copy_threads": 0}}, {}, "copy_threads"),
        ({}, {"dcp_size": 2}, "decode context parallelism"),
        ({"kvd": {}}, {}, "which weights"),
    ],
)
def test_what_cannot_be_cached_safely_is_off_and_says_why(
    attach: Attach, daemon: Daemon, extra: dict[str, Any], config: dict[str, Any], why: str
) -> None:
    good = options(daemon)["kvd"]
    if "kvd" in extra:
        good.pop("weights_id")
    extra = {"interface_v1": 1, "kvd": good | extra.get("kvd", {})}
    controller = attach("0.5.23", ready=False, extra=extra, **config)
    eventually(lambda: controller.backend.circuit.startswith("off"), 5)
    assert why in controller.backend.circuit
    slots = pools.page_slots(controller.pool, [0, 1, 2])
    controller.backup(span(3), slots)
    assert controller.prefetch(span(3), slots) == 0
    assert not controller.dead


# -- tensor parallel, MLA, side pools ----------------------------------------------------------------------------


def _ranks(daemon: Daemon, count: int, mla: bool = False, **side: Any) -> TensorParallel:
    make = pools.MLATokenToKVPoolHost if mla else pools.MHATokenToKVPoolHost
    backend = fake_sglang.load_backend_class("kvd.sidecar.hicache", "KvdStorage", forget=("kvd.sidecar",))
    return TensorParallel.build(
        Controller0523, backend, [make() for _ in range(count)], extra_config=options(daemon), is_mla_model=mla, **side
    )


@pytest.fixture
def release_0523() -> Iterator[None]:
    with fake_sglang.fake_sglang(RELEASES["0.5.23"], fake_sglang.server_args(model_path="")):
        yield


@pytest.mark.usefixtures("release_0523")
@pytest.mark.parametrize("mla", [False, True])
def test_ranks_get_their_own_shard_back(daemon: Daemon, mla: bool) -> None:
    worker = _ranks(daemon, 2, mla).attach()
    try:
        for controller in worker.controllers:
            eventually(lambda c=controller: c.backend.ready, 10)
        slots = [pools.page_slots(c.pool, [0, 1, 2]) for c in worker.controllers]
        written = [pools.fill_pages(c.pool, [0, 1, 2], seed=0 if mla else n) for n, c in enumerate(worker.controllers)]
        worker.backup(span(3), slots)
        assert daemon.status().tiers[0].pages == 3
        used = daemon.status().tiers[0].bytes_used
        assert used == 3 * 4096 * (1 if mla else 2), "MLA is stored once, shards once each"
        back = [pools.page_slots(c.pool, [10, 11, 12]) for c in worker.controllers]
        assert worker.prefetch(span(3), back) == 3
        for controller, expected in zip(worker.controllers, written, strict=True):
            assert pools.same_pages(controller.pool, [10, 11, 12], expected)
        assert worker.errors == []
    finally:
        worker.detach()


@pytest.mark.usefixtures("release_0523")
def test_a_page_is_visible_only_when_every_shard_is_in(daemon: Daemon) -> None:
    worker = _ranks(daemon, 2).attach()
    try:
        left, right = worker.controllers
        for controller in worker.controllers:
            eventually(lambda c=controller: c.backend.ready, 10)
        slots = pools.page_slots(left.pool, [0, 1, 2])
        left.backend.batch_set_v1(span(3), slots)
        assert left.backend.batch_exists(span(3)) == 0
        assert left.backend.batch_get_v1(span(3), slots) == [False] * 3
        right.backend.batch_set_v1(span(2), slots[:8])
        assert [c.backend.batch_exists(span(3)) for c in worker.controllers] == [2, 2]
        assert daemon.faults() == []
    finally:
        worker.detach()


def test_a_side_pool_that_cannot_be_read_is_a_miss(attach: Attach) -> None:
    """0.5.10's Mamba pool does not say where its pages are."""
    pool, state = pools.MHATokenToKVPoolHost(release="0.5.10"), pools.MambaPoolHost(release="0.5.10")
    controller = attach("0.5.10", pool, side_pools={"mamba": state}, ready=False)
    eventually(lambda: controller.backend.circuit == "closed", 10)
    sides = [Side("mamba", pools.page_slots(state, [2]), window=1)]
    controller.backup(span(4), pools.page_slots(pool, [0, 1, 2, 3]), sides=sides)
    assert controller.prefetch(span(4), pools.page_slots(pool, [0, 1, 2, 3]), sides=sides) == 0
    assert not controller.dead


def test_side_pools_come_back_with_the_pages(attach: Attach) -> None:
    pool, state = pools.MHATokenToKVPoolHost(), pools.MambaPoolHost()
    controller = attach("0.5.23", pool, side_pools={"mamba": state})
    stored, back = [0, 1, 2, 3], [30, 31, 32, 33]
    written, states = pools.fill_pages(pool, stored), pools.fill_pages(state, [2])
    sides = [Side("mamba", pools.page_slots(state, [2]), window=1)]
    assert controller.backup(span(4), pools.page_slots(pool, stored), sides=sides) == 4
    sides = [Side("mamba", pools.page_slots(state, [9]), window=1)]
    assert controller.prefetch(span(5), pools.page_slots(pool, [*back, 50]), sides=sides) == 4
    assert pools.same_pages(pool, back, written)
    assert pools.same_pages(state, [9], states)
    assert controller.errors == []


def test_a_logical_anchor_answers_for_its_side_pools(attach: Attach) -> None:
    controller = attach("0.5.23", pools.LogicalHostPool(), ready=False)
    eventually(lambda: controller.backend.circuit == "closed", 10)
    backend = controller.backend
    slots = pools.page_slots(controller.pool, [0, 1])
    assert backend.batch_set_v1(span(2), slots) == [True, True]
    assert backend.batch_get_v1(span(2), slots) == [True, True]
    assert backend.batch_exists(span(2)) == 2
