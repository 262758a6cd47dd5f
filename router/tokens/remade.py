"""Tokenizers that transformers 5 does not take from tokenizer.json, but makes anew by their class. Pure.

Of the file such a class keeps the vocabulary, the merges, the added tokens and what stands around a text. SGLang
0.5.23 gives the pre-tokenizer back where the file has one of another kind (srt/utils/hf_transformers/tokenizer.py).
Classes that are not here take the file as it is, or are not known: then the parity probe says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Regex, models, normalizers, pre_tokenizers

# Of these model types transformers takes the own class, whatever tokenizer_class says (of those in its
# MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS, the ones that have a class of their own).
_OF_TYPE: Final = {
    "qwen2": "Qwen2Tokenizer", "hyperclovax_vision_v2": "GPT2Tokenizer",
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"), "Qwen3_5Tokenizer"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Remade:
    """`tokens`: bos_token and its kin where the configuration does not say which they are."""

    tokens: Mapping[str, str]
    normalizer: Any
    pre_tokenizer: Any
    fuse_unk: bool = False
    byte_fallback: bool = False
    has_unk: bool = False  # for what the vocabulary lacks

    def remake(self, tokenizer: Any, unk_token: str | None) -> None:
        """In place."""
        model, told = tokenizer.model, tokenizer.pre_tokenizer
        if isinstance(model, models.BPE):
            model.unk_token, model.ignore_merges = unk_token if self.has_unk else None, False
            model.fuse_unk, model.byte_fallback = self.fuse_unk, self.byte_fallback
        tokenizer.normalizer = self.normalizer
        if told is None or type(told) is type(self.pre_tokenizer):
            tokenizer.pre_tokenizer = self.pre_tokenizer


def remade(config: Mapping[str, Any], model_type: str) -> Remade | None:
    """By tokenizer_config.json; None where tokenizer.json says it all."""
    prefixed = config.get("add_prefix_space")
    steps: Any
    match _OF_TYPE.get(model_type) or str(config.get("tokenizer_class")).removesuffix("Fast"):
        case "LlamaTokenizer":
            scheme = "never" if prefixed is False else "always" if config.get("legacy") else "first"
            steps = pre_tokenizers.Metaspace("▁", scheme, split=False)
            return Remade(_named("<s>", "</s>", "<unk>"), None, steps, fuse_unk=True, byte_fallback=True)
        case "GemmaTokenizer":
            tokens = _named("<bos>", "<eos>", "<unk>", "<pad>") | {"mask_token": "<mask>"}
            steps = pre_tokenizers.Split(" ", "merged_with_previous")
            return Remade(tokens, normalizers.Replace(" ", "▁"), steps, True, True, has_unk=True)
        case "CohereTokenizer":
            tokens = _named("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>", "<PAD>")
            tokens |= {"cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"}
            digits = pre_tokenizers.Digits(individual_digits=True)
            return Remade(tokens, normalizers.NFC(), pre_tokenizers.Sequence([digits, _bytes(prefixed)]))
        case "GPT2Tokenizer":
            return Remade(_named(*["<|endoftext|>"] * 3), None, _bytes(prefixed))
        case "Qwen2Tokenizer" | "Qwen3_5Tokenizer" as name:
            end = "<|endoftext|>"
            tokens = {"eos_token": end, "unk_token": end, "pad_token": end}
            rule = _qwen(r"\p{L}" if name == "Qwen2Tokenizer" else r"\p{L}\p{M}")
            split = pre_tokenizers.Split(Regex(rule), "isolated")
            steps = pre_tokenizers.Sequence([split, _bytes(prefixed, use_regex=False)])
            return Remade(tokens, normalizers.NFC(), steps)
    return None


def _named(bos: str, eos: str, unk: str, pad: str | None = None) -> dict[str, str]:
    tokens = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    return tokens if pad is None else tokens | {"pad_token": pad}


def _bytes(prefixed: Any, use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=bool(prefixed), use_regex=use_regex)


def _qwen(letters: str) -> str:
    """How Qwen splits text; `letters`: what words are of."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|\p{{N}}| ?[^\s{letters}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
