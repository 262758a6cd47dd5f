"""From a request to its prompts' tokens: what the proxy calls. One `Tokeniser` for each model that workers serve.

    for prompt in await tokeniser.tokenise_soon(path, body):     # one for each prompt of a batch
        prompt.ids, prompt.reason, prompt.detail
        hashes = tokeniser.hashes(prompt, scheme)                # as the worker's events name its blocks

The body is what the JSON says, nothing checked yet, and it is not changed. Never raises for what a client sent: a
request that the worker will refuse has a reason here and no tokens.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from kvd.errors import SettingsError
from kvd.router.tokens import anthropic, responses
from kvd.router.tokens.blocks import Naming, Scheme
from kvd.router.tokens.chat import Chat, prepare
from kvd.router.tokens.encode import MEMO_BYTES, Encoded, Encoder
from kvd.router.tokens.folder import ModelFolder
from kvd.router.tokens.outcome import PLAIN, Namespace, NoTokens, Why
from kvd.router.tokens.serving import Serving
from kvd.router.tokens.template import ChatTemplate, choose
from kvd.router.tokens.tokenizer import Reference

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
EMBEDDINGS: Final = "/v1/embeddings"
GENERATE: Final = "/generate"
PATHS: Final = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS, GENERATE)
_UNSALTED: Final = (MESSAGES, EMBEDDINGS)  # SGLang's models of these have neither salt nor key: it does not see them
_NO_MODEL: Final = (RESPONSES, GENERATE)  # whose "model" names no adapter; Responses have none in any way
_NO_PATH: Final = (RESPONSES, MESSAGES)  # nor does the "lora_path" of these
_MEDIA: Final = ("image_data", "video_data", "audio_data")


class Tokenised(msgspec.Struct, frozen=True, eq=False):
    """One prompt. `ids` are the worker's (uint32), or None with `reason`, and what exactly in `detail`."""

    ids: "array[int] | None"
    reason: Why | None = None
    detail: str = ""
    namespace: Namespace = PLAIN
    encoded: Encoded | None = None  # for hashes()

    @classmethod
    def none(cls, failure: NoTokens, namespace: Namespace = PLAIN) -> "Tokenised":
        return cls(None, failure.why, failure.detail, namespace)


class _Text(msgspec.Struct, frozen=True, eq=False):
    """A prompt still to be encoded. `bare`: a chat's, which has its special tokens already; `prefix` is not one's."""

    text: str
    namespace: Namespace
    bare: bool = False
    prefix: str = ""


class _Ids(msgspec.Struct, frozen=True, eq=False):
    ids: "array[int]"
    namespace: Namespace


class Tokeniser:
    """A model as a worker serves it. `counts`: prompts by what became of them, for metrics."""

    def __init__(self, folder: ModelFolder, serving: Serving, encoder: Encoder, template: ChatTemplate | None) -> None:
        self.serving = serving
        self.encoder = encoder
        self.template = template
        self.counts: Counter[str] = Counter()
        self._folder = folder
        self._no_chat = serving.refuses_chats(folder) or ("" if template else "the model has no chat template")

    @classmethod
    def open(cls, path: Path, serving: Serving, memo_bytes: int = MEMO_BYTES) -> "Tokeniser":
        """Reads the folder; about a second. Raises SettingsError where its tokenizer or template cannot be used."""
        folder = ModelFolder.read(path)
        source = _template(folder, serving)
        template = None if source is None else ChatTemplate(source, folder.special_tokens)
        return cls(folder, serving, Encoder(Reference(folder), source or "", memo_bytes), template)

    def tokenise(self, path: str, body: Any) -> list[Tokenised]:
        """Each prompt of the request, at least one."""
        return [self._counted(self._encoded(each)) for each in self._prompts(path, body)]

    async def tokenise_soon(self, path: str, body: Any) -> list[Tokenised]:
        """The same, without holding up the event loop: long texts are encoded in a thread."""
        return [self._counted(await self._encoded_soon(each)) for each in self._prompts(path, body)]

    def hashes(self, prompt: Tokenised, scheme: Scheme) -> list[int]:
        """Event hashes of the prompt's whole pages; none where it has no tokens, or its adapter's id is not known."""
        return self._hashes(prompt, scheme.names)

    def stored(self, prompt: Tokenised, scheme: Scheme) -> list[int]:
        """The same of its pages in tiers below the workers; none where those have the same names as in events."""
        return [] if prompt.namespace.plain else self._hashes(prompt, scheme.stores)

    def _hashes(self, prompt: Tokenised, names: Callable[[Namespace], Naming]) -> list[int]:
        if prompt.ids is None:
            return []
        try:
            naming = names(prompt.namespace)
        except NoTokens as failure:
            self.counts[failure.why] += 1
            return []
        return self.encoder.hashes(prompt.encoded or Encoded(prompt.ids), naming)

    @property
    def special_tokens(self) -> list[str]:
        """As they are written."""
        return list(dict.fromkeys(self._folder.special_tokens.values()))

    def text(self, text: str) -> "array[int]":
        """Ids of a text as a completion's prompt has them."""
        return self.encoder.surround(self.encoder.encode(text), text).ids

    def close(self) -> None:
        self.encoder.close()

    # What the request asks

    def _prompts(self, path: str, body: Any) -> list[_Text | _Ids | Tokenised]:
        try:
            if not isinstance(body, Mapping):
                raise NoTokens(Why.INVALID, "the body is no JSON object")
            if path in (CHAT, RESPONSES, MESSAGES):
                return [self._chat(path, body)]
            if path in (COMPLETIONS, EMBEDDINGS, GENERATE):
                return list(self._plain(path, body))
            raise NoTokens(Why.ENDPOINT, path)
        except NoTokens as failure:
            return [Tokenised.none(failure)]
        except (AttributeError, TypeError, KeyError, IndexError, ValueError, RecursionError) as error:
            # Shapes that no check above names; the worker's models refuse them.
            return [Tokenised.none(NoTokens(Why.INVALID, f"{type(error).__name__}: {error}"))]

    def _chat(self, path: str, body: Mapping[str, Any]) -> _Text | _Ids:
        namespace = self._namespaces(path, body, 1)[0]
        if path == CHAT and body.get("input_ids") is not None:
            return _Ids(_checked(body["input_ids"]), namespace)
        if self.template is None or self._no_chat:
            raise NoTokens(Why.TEMPLATE, self._no_chat)
        if path == RESPONSES and self._folder.model_type == "gpt_oss":
            raise NoTokens(Why.TEMPLATE, "Responses of gpt-oss are rendered by an encoder of its own")
        if self._folder.multimodal and self.encoder.surroundings != (array("I"), array("I")):
            raise NoTokens(Why.UNSUPPORTED, "a multimodal model whose tokenizer adds tokens to a rendered chat")
        if path != CHAT:
            convert = responses.as_chat if path == RESPONSES else anthropic.as_chat
            body = convert(body, self.template.inline_system)
        chat = prepare(body, self.template, self.serving.template_defaults, path != RESPONSES)
        return _Text(self._rendered(self.template, chat), namespace, True, chat.prefix)

    def _rendered(self, template: ChatTemplate, chat: Chat) -> str:
        """As the worker: where the template fails, once more with tools without their wrapping."""
        try:
            return template.render(chat.messages, chat.tools, chat.variables)
        except Exception:
            flat = [tool["function"] for tool in chat.tools] if chat.tools else None
        try:
            return template.render(chat.messages, flat, chat.variables)
        except Exception as error:
            raise NoTokens(Why.INVALID, f"the template refuses it: {error}") from error

    def _plain(self, path: str, body: Mapping[str, Any]) -> list[_Text | _Ids]:
        if path == COMPLETIONS and self.serving.completion_template is not None:
            raise NoTokens(Why.UNSUPPORTED, "--completion-template")
        if path == EMBEDDINGS and self._folder.architecture == "Gemma3TextModel":
            raise NoTokens(Why.UNSUPPORTED, "the worker may end this model's texts with EOS")
        if path == GENERATE:
            _only_tokens(body)
            given = body.get("text") if body.get("text") is not None else body.get("input_ids")
        else:
            given = body.get("prompt" if path == COMPLETIONS else "input")
        several = isinstance(given, list) and given and not isinstance(given[0], int)
        prompts: list[Any] = list(given or ()) if several else [given]
        namespaces = self._namespaces(path, body, len(prompts))
        return [
            _Text(prompt, namespace) if isinstance(prompt, str) else _Ids(_checked(prompt), namespace)
            for prompt, namespace in zip(prompts, namespaces, strict=True)
        ]

    def _namespaces(self, path: str, body: Mapping[str, Any], count: int) -> list[Namespace]:
        model = None if path in _NO_MODEL else body.get("model")
        lora_path = None if path in _NO_PATH else body.get("lora_path")
        adapter = self.serving.adapter_of(model, lora_path)
        told: list[Any] = [body.get("cache_salt"), body.get("extra_key"), adapter]
        if path in _UNSALTED:
            told[:2] = None, None
        if told == [None, None, None]:
            return [PLAIN] * count
        columns: list[list[Any]] = [list(each) if isinstance(each, list) else [each] * count for each in told]
        if any(len(column) != count for column in columns):
            raise NoTokens(Why.INVALID, "as many salts, keys and adapters as prompts are needed")
        if any(each is not None and not isinstance(each, str) for column in columns for each in column):
            raise NoTokens(Why.INVALID, "a salt, key or adapter is no text")
        return [Namespace(*(each or None for each in row)) for row in zip(*columns, strict=True)]

    # Its tokens

    def _encoded(self, prompt: _Text | _Ids | Tokenised) -> Tokenised:
        if isinstance(prompt, _Text):
            try:
                return self._whole(prompt, self.encoder.encode(prompt.text))
            except NoTokens as failure:
                return Tokenised.none(failure, prompt.namespace)
        return Tokenised(prompt.ids, namespace=prompt.namespace) if isinstance(prompt, _Ids) else prompt

    async def _encoded_soon(self, prompt: _Text | _Ids | Tokenised) -> Tokenised:
        if not isinstance(prompt, _Text) or self.encoder.brief(prompt.text):
            return self._encoded(prompt)
        try:
            return self._whole(prompt, await self.encoder.encode_soon(prompt.text))
        except NoTokens as failure:
            return Tokenised.none(failure, prompt.namespace)

    def _whole(self, prompt: _Text, encoded: Encoded) -> Tokenised:
        if not prompt.bare:
            encoded = self.encoder.surround(encoded, prompt.text)
        if prompt.prefix:
            prefix = self.encoder.surround(self.encoder.encode(prompt.prefix), prompt.prefix).ids
            if prefix and prefix[0] == self.encoder.reference.bos_id:
                prefix = prefix[1:]
            encoded = Encoded(encoded.ids + prefix, encoded.found)
        return Tokenised(encoded.ids, namespace=prompt.namespace, encoded=encoded)

    def _counted(self, prompt: Tokenised) -> Tokenised:
        self.counts[prompt.reason or "tokens"] += 1
        return prompt


def _only_tokens(body: Mapping[str, Any]) -> None:
    if body.get("input_embeds") is not None:
        raise NoTokens(Why.EMBEDS, "input_embeds")
    if any(body.get(name) for name in _MEDIA):
        raise NoTokens(Why.MULTIMODAL, "media beside the text")
    if body.get("session_params"):
        raise NoTokens(Why.STATE, "session_params: the worker has the session's earlier tokens")


def _checked(ids: Any) -> "array[int]":
    if isinstance(ids, Mapping) or (isinstance(ids, list) and ids and isinstance(ids[0], Mapping)):
        raise NoTokens(Why.MULTIMODAL, "the input is neither text nor ids")
    if not isinstance(ids, list) or not ids:
        raise NoTokens(Why.INVALID, "there is no prompt")
    try:
        return array("I", ids)
    except (TypeError, OverflowError) as error:
        raise NoTokens(Why.INVALID, f"an id is no uint32: {error}") from error


def _template(folder: ModelFolder, serving: Serving) -> str | None:
    """The template's source: the file that the worker's command line names, else the folder's."""
    named = serving.chat_template
    if named is None or not named.endswith(".jinja"):
        return choose(folder.templates, serving.template_name)
    try:
        source = Path(named).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"the workers' --chat-template cannot be read here: {error}", "put the file where the router finds it"
        ) from error
    return source.strip("\n").replace("\\n", "\n")
