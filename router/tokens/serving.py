"""What of a worker's configuration changes its prompts, from its /server_info. Pure.

Some models' prompts are not made by a Jinja template in SGLang but by code of its own. Those are named here and
refused, so that a chat of theirs is routed without prefix credit; their completions are as exact as others'.
"""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kvd.router.tokens.folder import ModelFolder

# Paths and model types for which SGLang takes a conversation template of its own (srt/parser/conversation.py).
_CONVERSATION_PATHS: Final = re.compile(
    r"\bpoints\b|moss.*vl|internvl|janus|vicuna|llava-v1\.[56]|llava-next-video|llava-onevision-qwen2|deepseek.*vl2"
    r"|minicpm-[vo]|phi-4-multimodal|deepseek-ocr|unlimited|paddleocr|whisper",
    re.IGNORECASE,
)
_CONVERSATION_TYPES: Final = frozenset(
    {"internvl_chat", "deepseek_vl_v2", "multi_modality", "phi4mm", "minicpmv", "minicpmo", "moss_vl", "deepseek-ocr",
     "unlimited-ocr", "paddleocr_vl", "whisper"}
)  # fmt: skip
_OWN_ENCODERS: Final = ("DeepseekV4", "DeepseekV41", "KimiK3", "InklingForConditionalGeneration")
_OWN_PARSERS: Final = frozenset({"deepseekv41", "deepseekv4", "deepseekv32", "kimi_k3", "muse", "beam"})
_OWN_TEMPLATES: Final = ("GlmMoeDsaForCausalLM", "Glm5NextForConditionalGeneration")
_OWN_REASONING: Final = frozenset({"hunyuan", "minimax-m3", "iquest_q1", "inkling", "beam", "muse"})


@dataclass(frozen=True, slots=True)
class Serving:
    """How a worker serves its model. The defaults are those of a launch without options."""

    model_path: str = ""
    served_name: str = ""
    chat_template: str | None = None  # --chat-template: a file, or a name that SGLang knows
    template_name: str | None = None  # --hf-chat-template-name
    completion_template: str | None = None
    template_defaults: Mapping[str, Any] = field(default_factory=dict)  # --default-chat-template-kwargs
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)  # LoRA name -> id

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "Serving":
        """From what GET /server_info answers; what is absent is not set."""
        return cls(
            str(info.get("model_path") or ""),
            str(info.get("served_model_name") or ""),
            info.get("chat_template"),
            info.get("hf_chat_template_name"),
            info.get("completion_template"),
            dict(info.get("default_chat_template_kwargs") or {}),
            info.get("reasoning_parser"),
            info.get("tool_call_parser"),
            _adapters(info.get("lora_paths")),
        )

    def adapter_of(self, model: Any, lora_path: Any) -> Any:
        """The adapter a request names: "base:adapter" in its model goes before its lora_path, which may be a list."""
        if not isinstance(model, str) or ":" not in model or model == self.served_name:
            return lora_path or None
        prefix = f"{self.served_name}:"
        name = model[len(prefix) :] if model.startswith(prefix) else model.split(":", 1)[1]
        return name.strip() or lora_path or None

    def refuses_chats(self, folder: ModelFolder) -> str | None:
        """Why a chat with this worker has no tokens here; None where it has."""
        architecture = folder.architecture
        if self.chat_template is not None and not self.chat_template.endswith(".jinja"):
            return f"--chat-template {self.chat_template} is a conversation template of SGLang's own"
        if self.chat_template is None and (
            _CONVERSATION_PATHS.search(self.model_path) or folder.model_type in _CONVERSATION_TYPES
        ):
            return "SGLang takes a conversation template of its own for this model"
        if any(name in architecture for name in _OWN_ENCODERS) or folder.model_type == "deepseek_v41":
            return f"{architecture} has an encoder of its own in SGLang"
        if "DeepseekV3" in architecture and not folder.templates:
            return f"{architecture} without a template has an encoder of its own in SGLang"
        if architecture in _OWN_TEMPLATES or folder.model_type == "minimax_m3_vl":
            return f"SGLang may render {architecture} with a template in Python"
        if self.tool_call_parser in _OWN_PARSERS:
            return f"--tool-call-parser {self.tool_call_parser} has an encoder of its own in SGLang"
        if self.reasoning_parser in _OWN_REASONING:
            return f"--reasoning-parser {self.reasoning_parser} changes prompts in ways not known here"
        return None


def _adapters(told: Any) -> dict[str, str]:
    """Adapters given at launch have ids that follow from name and path; others' are drawn."""
    pairs: list[tuple[str, str]] = []
    if isinstance(told, Mapping):
        told = [{"lora_name": name, "lora_path": path} for name, path in told.items()]
    for each in told or ():
        if isinstance(each, list | tuple):  # as a LoRARef is printed
            each = dict(zip(("lora_id", "lora_name", "lora_path"), each, strict=False))
        if isinstance(each, Mapping):
            name, path = str(each.get("lora_name") or ""), str(each.get("lora_path") or "")
            pairs.append((name, str(each.get("lora_id") or _launch_id(name, path))))
        elif isinstance(each, str):
            name, _, path = each.rpartition("=")
            pairs.append((name or path, _launch_id(name or path, path)))
    return dict(pairs)


def _launch_id(name: str, path: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{name}\0{path}").hex
