"""Launch settings that make a page's bytes others than another worker's for the same tokens and weight files.

Counted: what changes the weights, what is computed from them, the precision in which, or the order of the bytes.
Not counted: by which kernel, on which ranks or in which batches the same thing is computed; the last bits may differ
then, as they do between two requests to one worker. What is as SGLang has it by default leaves no trace, so that an
identity stays when one more setting is counted; `test_shaping` keeps that.

Judged: every field of ServerArgs in sglang 0.5.23 (srt/arg_groups/fields), and older names of some.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvd.errors import Unsupported
from kvd.sidecar.weights import fingerprint, folder

EVERYWHERE: Final = (
    # the weights, and what they are used as
    "quantization_param_path", "torchao_config", "modelopt_quant", "modelopt_checkpoint_restore_path",
    "quantize_and_serve", "rl_quant_profile", "decrypted_config_file", "model_config_parser", "forward_hooks",
    "experts_shared_outer_loras", "kt_weight_path", "kt_method", "kt_num_gpu_experts",
    "kt_max_deferred_experts_per_token",
    # attention that leaves something out
    "enable_hisparse", "hisparse_config", "enable_encoder_swa_bounded_replay", "enable_decoder_swa_bounded_replay",
    "dllm_algorithm", "dllm_algorithm_config",
    # precision, and bits that were promised to be always the same
    "enable_tf32_matmul", "enable_quant_communications", "enable_w4a4_mxfp4_megamoe", "flashinfer_mxfp4_moe_precision",
    "deepep_dispatcher_output_dtype", "prefill_kv_cache_dequant_dtype", "mamba_ssm_dtype",
    "enable_mamba_cache_stochastic_rounding", "enable_int8_mamba_checkpoint", "enable_deterministic_inference",
    "rl_on_policy_target",
    # what becomes of an image, whose key may be that of its file
    "mm_process_config", "image_processor_backend", "disable_fast_image_processor",
    "enable_precise_embedding_interpolation",
    # what lies where in a page
    "dsv4_attn_backend", "enable_deepseek_v4_fp4_indexer", "qsa_indexer_dtype", "enable_dsa_cache_layer_split",
)  # fmt: skip
_OF_NAMED: Final = ("quantization", "json_model_override_args", "model_impl")  # else part of the weights' name
STORED: Final = ("kv_cache_dtype", "dtype")
OF_DRAFTS: Final = (
    "speculative_algorithm", "speculative_draft_load_format", "speculative_draft_model_quantization",
    "speculative_draft_kv_cache_dtype", "speculative_draft_window_size", "speculative_draft_sink_size",
    "speculative_enable_w4a4_mxfp4_megamoe", "enable_multi_layer_eagle", "decrypted_draft_config_file",
    "uno_lora_path",
)  # fmt: skip
# Orders of bytes that no setting and no host pool tells (sglang 0.5.23, srt/environ.py).
_ENVIRONMENT: Final = (
    "SGLANG_USE_HND_KVCACHE", "SGLANG_AITER_KV_CACHE_LAYOUT", "SGLANG_DSV4_KV_LAYOUT",
    "SGLANG_DSV4_COMPRESSED_KV_LAYOUT", "SGLANG_DSV4_UNIFIED_KV_FP8",
)  # fmt: skip
_DEFAULTS: Final = {
    "kt_method": "AMXINT4", "flashinfer_mxfp4_moe_precision": "default", "json_model_override_args": "{}",
    "mamba_ssm_dtype": "float32",  # until 0.5.22; a pool of other numbers has pages of another size
}  # fmt: skip
# Unset, SGLang decides: off is something else.
DECIDED: Final = (
    "enable_tf32_matmul", "enable_decoder_swa_bounded_replay", "experts_shared_outer_loras",
    "speculative_enable_w4a4_mxfp4_megamoe",
)  # fmt: skip
_PLAIN: Final = ("torch.float16", "torch.bfloat16", "torch.float32")
_MOST_BYTES: Final = 16 << 20


def everywhere(arguments: Any, environ: Mapping[str, str], by_path: bool) -> str:
    """Of all pools. `by_path`: the operator named the weights, so what cannot be read counts by its path."""
    names = EVERYWHERE + _OF_NAMED if by_path else EVERYWHERE
    found = _counted(arguments, names) | {name: environ[name] for name in _ENVIRONMENT if environ.get(name)}
    adapters = {name: _files(path, None, by_path) for name, path in _adapters(arguments)}
    if adapters:  # SGLang's keys name them by name and path, and not by what is there
        found["lora_paths"] = json.dumps(adapters, sort_keys=True)
    return _digest(found)


def of_pool(name: str, pool: Any, arguments: Any, by_path: bool) -> str:
    """Of one pool besides. Raises Unsupported where a draft model cannot be read."""
    found = {}
    dtype = str(getattr(pool, "dtype", ""))
    if dtype not in _PLAIN or _counted(arguments, ("kv_cache_dtype",)):  # fp8 of either kind is stored as uint8
        found = _counted(arguments, STORED)
    if _holds_draft(name, pool):
        found |= _counted(arguments, OF_DRAFTS)
        path = getattr(arguments, "speculative_draft_model_path", None)
        if path and path != getattr(arguments, "model_path", None):
            revision = getattr(arguments, "speculative_draft_model_revision", None)
            found["speculative_draft_model_path"] = _files(path, revision, by_path)
    return _digest(found)


def _holds_draft(name: str, pool: Any) -> bool:
    """Is this a draft model's pool, or are layers of one packed into each page?"""
    layers = getattr(pool, "layer_num", None)
    return (
        name.startswith("draft")
        or getattr(pool, "target_layer_num", layers) != layers
        or any(getattr(pool, packed, ()) for packed in ("mtp_draft_buffer_infos", "mtp_draft_device_pools"))
        or type(pool).__name__.startswith("QSA")  # packs them, and does not say so
    )


def _counted(arguments: Any, names: tuple[str, ...]) -> dict[str, str]:
    """Those of the settings that are not as by default; a small file counts by what is in it."""
    found = {}
    for name in names:
        value = getattr(arguments, name, None)
        off = value is False and name not in DECIDED
        if not (off or value in (None, "", "auto", {}, [], _DEFAULTS.get(name))):
            found[name] = _content(value) or json.dumps(value, sort_keys=True, default=str)
    return found


def _content(value: Any) -> str:
    """Digest of the file that a setting names, or "" where it names none."""
    try:
        if isinstance(value, str) and (file := Path(value)).is_file() and file.stat().st_size <= _MOST_BYTES:
            return hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, ValueError):
        pass
    return ""


def _files(path: str, revision: str | None, by_path: bool) -> str:
    try:
        return fingerprint(folder(path, revision))
    except (Unsupported, OSError) as error:
        if by_path:
            return f"{path}@{revision}"
        if isinstance(error, OSError):
            raise Unsupported(f"cannot read {path!r}: {error}", 'set "weights_id" under "kvd"') from error
        raise


def _adapters(arguments: Any) -> list[tuple[str, str]]:
    """Name and path of each in --lora-paths, in any of the forms that SGLang gives it."""
    given = getattr(arguments, "lora_paths", None) or ()
    if isinstance(given, Mapping):
        given = [{"lora_name": name, "lora_path": path} for name, path in given.items()]
    found = []
    for item in given:
        if isinstance(item, str):
            name, _, path = item.partition("=")
            found.append((name, path or name))
        elif isinstance(item, Mapping):
            found.append((str(item.get("lora_name")), str(item.get("lora_path"))))
        else:
            found.append((str(item.lora_name), str(item.lora_path)))
    return found


def _digest(found: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else ""
