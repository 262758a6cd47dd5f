"""Runs inside SGLang's environment: the prompts that its own request models, converters and template code make.

Reads {"models": [folder, ...], "cases": [[path, body], ...]} from stdin and writes, for each model, a JSON list to the
file that its argument names: ids, or {"error": text}. The serving classes are SGLang's; a few attributes stand in for
what they ask of a running server.
"""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock


def main() -> None:
    order = json.load(sys.stdin)
    for name in ("openai_harmony", "sglang.srt.entrypoints.harmony_utils"):  # not in a CPU environment
        sys.modules[name] = MagicMock()
    found = [answers(Server(model), order["cases"]) for model in order["models"]]
    Path(sys.argv[1]).write_text(json.dumps(found))


def answers(serve: "Server", cases: Any) -> list[Any]:
    import orjson  # as SGLang's server reads bodies

    found = []
    for path, body in cases:
        try:
            found.append(serve.ids(path, orjson.loads(json.dumps(body))))
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
    return found


class Server:
    def __init__(self, model: str) -> None:
        from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
        from sglang.srt.entrypoints.openai import serving_chat
        from sglang.srt.managers.tokenizer_manager import TokenizerManager
        from sglang.srt.parser.template_manager import TemplateManager
        from sglang.srt.utils.hf_transformers_utils import get_tokenizer
        from transformers import AutoConfig

        self.tokenizer = get_tokenizer(model)
        config = AutoConfig.from_pretrained(model)
        manager = SimpleNamespace(
            tokenizer=self.tokenizer, processor=None, served_model_name="m", model_path=model,
            config_value=lambda name: None, server_args=None, async_dynamic_batch_tokenizer=None,
            model_config=SimpleNamespace(
                hf_config=config, is_multimodal=False, is_embedding_gemma=False, get_default_sampling_params=dict
            ),
        )  # fmt: skip
        templates = TemplateManager()
        templates.load_chat_template(manager, None, model)
        serving = MagicMock(default_chat_template_kwargs={}, trust_request_chat_template=False)
        serving_chat.get_serving = lambda: serving
        serving_chat.get_model = lambda: SimpleNamespace(context_length=None, revision=None)
        self.chat = serving_chat.OpenAIServingChat(manager, templates)
        self.anthropic = AnthropicServing(self.chat)
        self.tokenize = lambda texts: asyncio.run(TokenizerManager._tokenize_texts(Texts(manager), texts))[0]

    def ids(self, path: str, body: Any) -> Any:
        from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest

        if path == "/v1/messages":
            return self._processed(
                self.anthropic._convert_to_chat_completion_request(AnthropicMessagesRequest(**body))
            )
        if path == "/v1/responses":
            return self._responses(body)
        if path == "/v1/chat/completions":
            return self._processed(ChatCompletionRequest(**body))
        return self.tokenize(CompletionRequest(model="m", **body).prompt)

    def _processed(self, request: Any) -> Any:
        refusal = self.chat._validate_request(request)
        if refusal:
            raise ValueError(refusal)
        effort = (request.chat_template_kwargs or {}).pop("reasoning_effort", None)
        if effort is not None:
            request.reasoning_effort = effort
        return self.chat._process_messages(request, False).prompt_ids

    def _responses(self, body: Any) -> Any:
        from sglang.srt.entrypoints.openai.protocol import ResponsesRequest
        from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses

        made = OpenAIServingResponses.__new__(OpenAIServingResponses)
        made.__dict__.update(self.chat.__dict__)
        request = ResponsesRequest(model="m", **body)
        return asyncio.run(made._make_request(request, None, self.tokenizer))[2][0]


class Texts:
    """As much of a TokenizerManager as encoding texts takes."""

    def __init__(self, manager: Any) -> None:
        from sglang.srt.managers.tokenizer_manager import TokenizerManager

        self.__dict__.update(manager.__dict__)
        for name in ("_detect_input_format", "_prepare_tokenizer_input", "_extract_tokenizer_results"):
            setattr(self, name, getattr(TokenizerManager, name).__get__(self))


if __name__ == "__main__":
    main()
