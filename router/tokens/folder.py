"""A model's folder, as far as tokens go: its tokenizer, its chat templates, its special tokens.

Read once, when a model is first seen. What transformers 5 and SGLang 0.5.23 do to these files while they load them is
done here too: added tokens that tokenizer.json lacks, who begins a text with BOS, which of several templates counts;
for what some classes put in the place of a tokenizer's own parts see kvd.router.tokens.remade.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvd.errors import SettingsError
from kvd.router.tokens.remade import Remade, remade

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
    more_special: Sequence[str] = ()  # that have no name
    templates: Mapping[str, str] = field(default_factory=dict)
    begins_with_bos: bool = False  # whatever tokenizer.json says
    remade: Remade | None = None  # what its class has instead of tokenizer.json's own parts
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
        if config.get("split_special_tokens"):
            raise SettingsError(
                f"the tokenizer of {folder} splits special tokens, which is not imitated here",
                "requests for this model are steered by load",
            )
        more_special = _more_special(config)
        if "added_tokens_decoder" not in config:  # what older releases wrote
            older = _read(folder / "special_tokens_map.json")
            config |= older
            more_special = more_special or _more_special(older)
        architectures, model_type = model.get("architectures") or [""], str(model.get("model_type", ""))
        anew = remade(config, model_type)
        config = {**(anew.tokens if anew is not None else {}), **config}
        return cls(
            path.read_text(encoding="utf-8"),
            _named(config),
            _added(folder, config, more_special),
            more_special,
            _templates(folder, config),
            config.get("tokenizer_class") in _BOS_BY_FLAG and config.get("add_bos_token") in (None, True),
            anew,
            str(architectures[0]),
            model_type,
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


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """Templates have each under its name. A model may have some of its own, as `image_token`."""
    own = config.get("extra_special_tokens")
    told = {**(own if isinstance(own, dict) else {}), **config}
    names = [name for name in told if name.endswith("_token") and name not in NAMED_TOKENS]
    return {name: _content(told[name]) for name in (*NAMED_TOKENS, *names) if isinstance(told.get(name), str | dict)}


def _more_special(config: Mapping[str, Any]) -> list[str]:
    told = config.get("extra_special_tokens")
    if not told or not isinstance(told, list):
        told = config.get("additional_special_tokens")  # what it was called before: counts where there is no other
    return [_content(token) for token in told] if isinstance(told, list) else []


def _added(folder: Path, config: Mapping[str, Any], more_special: Sequence[str]) -> dict[int, dict[str, Any]]:
    """By id; older releases wrote a file of ids by content."""
    if "added_tokens_decoder" in config:
        return {int(number): token for number, token in (config["added_tokens_decoder"] or {}).items()}
    special = {*_named(config).values(), *more_special}
    return {
        int(number): {"content": content, "special": content in special}
        for content, number in _read(folder / "added_tokens.json").items()
    }


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
