"""Which launch settings make a page's bytes others, and of which pools; the rest must not cost anybody the cache."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvd.errors import Unsupported
from kvd.sidecar import shaping
from kvd.sidecar.identity import Rank, namespace_spec
from tests.sglang_node import needs_sglang, told_by_sglang
from tests.test_weights import model

RANK = Rank((0, 1), (0, 1), (0, 1), False)


def launched(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**settings)


def pool(dtype: str = "torch.bfloat16", **attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"dtype": dtype, "page_size": 4, "layer_num": 3, "target_layer_num": 3} | attributes)


def everywhere(**settings: Any) -> str:
    return shaping.everywhere(launched(**settings), {}, by_path=False)


def of_pool(name: str, of: Any, **settings: Any) -> str:
    return shaping.of_pool(name, of, launched(**settings), by_path=False)


@pytest.mark.parametrize("name", shaping.EVERYWHERE)
def test_every_setting_that_counts_tells_workers_apart(name: str) -> None:
    assert everywhere(**{name: "something"}) not in ("", everywhere(**{name: "something else"}))


@pytest.mark.parametrize("name", ["quantization", "json_model_override_args"])
def test_an_operators_name_for_the_weights_says_nothing_of_what_is_made_of_them(name: str) -> None:
    assert shaping.everywhere(launched(**{name: "something"}), {}, by_path=True) != ""
    assert shaping.everywhere(launched(quantization=None, json_model_override_args="{}"), {}, by_path=True) == ""
    assert everywhere(**{name: "something"}) == "", "the weights' own name tells it"


def test_what_sglang_decides_unless_it_is_told_is_told_by_off_too() -> None:
    off, on, unset = (everywhere(enable_decoder_swa_bounded_replay=value) for value in (False, True, None))
    assert len({off, on, unset}) == 3


def test_as_sglang_starts_by_default_there_is_nothing_to_tell() -> None:
    """So that an identity stays what it is when kvd or SGLang gets to know one more setting."""
    assert shaping.everywhere(None, {}, by_path=False) == ""
    for neutral in (None, "", "auto"):
        assert everywhere(**dict.fromkeys(shaping.EVERYWHERE, neutral), lora_paths=[]) == ""
    assert everywhere(**dict.fromkeys({*shaping.EVERYWHERE} - {*shaping.DECIDED}, False)) == ""
    older = {"mm_process_config": {}, "mamba_ssm_dtype": "float32"}
    assert everywhere(**older) == "", "what releases before 0.5.23 write into their settings by themselves"
    assert everywhere(kt_method="AMXINT4", flashinfer_mxfp4_moe_precision="default") == ""
    assert everywhere(max_running_requests=3, attention_backend="triton", served_model_name="x") == ""
    assert of_pool("kv", pool(), kv_cache_dtype="auto", dtype="bfloat16", speculative_algorithm="EAGLE") == ""


def test_a_file_of_scales_counts_by_what_is_in_it(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text('{"kv_cache": 1.0}')
    two.write_text('{"kv_cache": 1.0}')
    before = everywhere(quantization_param_path=str(one))
    assert before == everywhere(quantization_param_path=str(two))
    one.write_text('{"kv_cache": 0.5}')
    assert before != everywhere(quantization_param_path=str(one))


def test_an_order_of_bytes_that_only_the_environment_tells_counts() -> None:
    assert shaping.everywhere(None, {"SGLANG_USE_HND_KVCACHE": "1"}, by_path=False)
    assert shaping.everywhere(None, {"HOME": "/root"}, by_path=False) == ""


def test_adapters_count_by_what_is_in_them(tmp_path: Path) -> None:
    """SGLang's keys name an adapter by its name and path; another one may lie there tomorrow."""
    adapter = model(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 16}')
    before = everywhere(lora_paths=[f"a={adapter}"])
    assert before == everywhere(lora_paths=[{"lora_name": "a", "lora_path": str(adapter)}])
    assert before == everywhere(lora_paths={"a": str(adapter)})
    assert before == everywhere(lora_paths=[SimpleNamespace(lora_name="a", lora_path=str(adapter))])
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert before != everywhere(lora_paths=[f"a={adapter}"])


def test_numbers_that_a_host_pool_shows_as_bytes_are_told_by_the_settings() -> None:
    raw = pool("torch.uint8")
    e5m2, e4m3 = (of_pool("kv", raw, kv_cache_dtype=name) for name in ("fp8_e5m2", "fp8_e4m3"))
    assert e5m2 != e4m3
    assert of_pool("kv", raw, kv_cache_dtype="fp8_e4m3", dtype="float16") != e4m3


PACKED = pool(layer_num=4)
DRAFTS = [
    ("draft", pool()), ("draft_swa", pool()), ("kv", PACKED), ("mamba", pool(mtp_draft_buffer_infos=(1,))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "of"), DRAFTS)
def test_pages_of_a_draft_model_are_told_apart_by_it(tmp_path: Path, name: str, of: Any) -> None:
    one, same = model(tmp_path / "one"), model(tmp_path / "same")
    other = model(tmp_path / "other", a=b"x" * 9000)
    settings: dict[str, Any] = {"speculative_algorithm": "EAGLE3", "model_path": "/target"}
    mine = of_pool(name, of, speculative_draft_model_path=str(one), **settings)
    assert mine == of_pool(name, of, speculative_draft_model_path=str(same), **settings)
    for different in (
        {"speculative_draft_model_path": str(other)},
        {"speculative_draft_model_path": str(one), "speculative_draft_model_quantization": "fp8"},
        {"speculative_draft_model_path": str(one), "speculative_algorithm": "EAGLE"},
        {"speculative_draft_model_path": str(one), "speculative_draft_window_size": 512},
    ):
        assert of_pool(name, of, **settings | different) != mine


def test_a_draft_that_cannot_be_read_counts_by_its_path_only_if_the_operator_answers_for_it() -> None:
    settings = launched(speculative_algorithm="EAGLE", speculative_draft_model_path="/nowhere/draft")
    with pytest.raises(Unsupported, match="/nowhere/draft"):
        shaping.of_pool("draft", pool(), settings, by_path=False)
    one = shaping.of_pool("draft", pool(), settings, by_path=True)
    settings.speculative_draft_model_path = "/nowhere/other"
    assert shaping.of_pool("draft", pool(), settings, by_path=True) != one


def test_what_one_pool_holds_leaves_the_family_as_it_is() -> None:
    plain, shaped = (
        namespace_spec("draft", pool(), 64, "pieces", RANK, "weights", "", "m", shape) for shape in ("", "draft")
    )
    assert plain.digest != shaped.digest
    assert plain.family == shaped.family


@pytest.mark.parametrize("format_", [{"storage_format_tag": "unified-token-major"}, {"head_group_num": 2}])
def test_a_page_format_of_its_own_is_a_namespace_of_its_own(format_: dict[str, Any]) -> None:
    plain, other = (
        namespace_spec("kv", pool(**more), 64, "pieces", RANK, "weights", "", "m")
        for more in ({"storage_format_tag": None, "head_group_num": 1}, format_)
    )
    assert plain.digest != other.digest
    assert plain.digest == namespace_spec("kv", pool(), 64, "pieces", RANK, "weights", "", "m").digest


DEFAULTS = """
import json
from sglang.srt.server_args import ServerArgs
default = ServerArgs(model_path="m")
print(json.dumps({name: getattr(default, name) for name in ServerArgs.__struct_fields__}, default=str))
"""


@needs_sglang
def test_the_installed_sglang_has_these_settings_and_its_defaults_count_for_nothing() -> None:
    defaults = json.loads(told_by_sglang(DEFAULTS).splitlines()[-1])
    assert {*shaping.EVERYWHERE, *shaping.OF_DRAFTS, *shaping.STORED} - {"torchao_config"} <= set(defaults)
    assert everywhere(**defaults) == of_pool("draft", pool("torch.uint8"), **defaults) == ""
    assert shaping.everywhere(launched(**defaults), {}, by_path=True) == ""
