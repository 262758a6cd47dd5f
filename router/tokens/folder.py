"""A model's folder, as far as tokens go: its tokenizer, its chat templates, its special tokens.

Read once, when a model is first seen. What transformers 5 and SGLang 0.5.23 do to these files while they load them is
done here too: added tokens that tokenizer.json lacks, who begins a text with BOS, which of several templates counts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvd.errors import SettingsError

NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The classes whose add_bos_token SGLang restores; others' tokenizer.json says it all.
_BOS_BY_FLAG: Final = frozenset(
    {"LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast", "GemmaTokenizer",
     "GemmaTokenizerFast", "CohereTokenizerFast"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What the files say. `templates` keeps the order in which SGLang would choose among them."""

    tokenizer: str  # tokenizer.json
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token and its kin, by name
    added_tokens: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    begins_with_bos: bool | None = None  # None: as tokenizer.json says
    architecture: str = ""
    model_type: str = ""
    multimodal: bool = False

    @classmethod
    def read(cls, folder: Path) -> "ModelFolder":
        """Raises SettingsError where there is no tokenizer that can be read without SGLang."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise SettingsError(
                f"no tokenizer.json in {folder}",
                "give the router the folder the workers serve, or let it ask the workers for tokens",
            )
        config = _read(folder / "tokenizer_config.json")
        model = _read(folder / "config.json")
        special = {**config, **_read(folder / "special_tokens_map.json")}
        architectures = model.get("architectures") or [""]
        return cls(
            path.read_text(encoding="utf-8"),
            {name: _content(special[name]) for name in NAMED_TOKENS if special.get(name) is not None},
            {int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()},
            _templates(folder, config),
            _begins_with_bos(config),
            str(architectures[0]),
            str(model.get("model_type", "")),
            any(name in model for name in ("vision_config", "audio_config")),
        )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON: {error}", "fetch the model's folder again") from error
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files go before what tokenizer_config.json says."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in _template_files(folder)}
    if files:
        return files
    told = config.get("chat_template")
    if isinstance(told, list):
        return {str(each["name"]): str(each["template"]) for each in told}
    if told is None:
        told = _read(folder / "chat_template.json").get("chat_template")  # where older processors keep it
    return {} if told is None else {"default": str(told)}


def _template_files(folder: Path) -> list[Path]:
    extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    single = folder / "chat_template.jinja"
    return [*([single] if single.is_file() else []), *extra]


def _begins_with_bos(config: Mapping[str, Any]) -> bool | None:
    if config.get("tokenizer_class") not in _BOS_BY_FLAG:
        return None
    told = config.get("add_bos_token")
    return True if told is None else bool(told)
