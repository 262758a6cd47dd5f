"""How fast do requests become tokens and block hashes, cold and as a conversation grows, next to plain tokenizers?

Texts: prompts of a real software agent (../shared/data/agentic/miniswe.jsonl.gz), or code of this checkout where that
is not there; the model is .models/smollm2-135m, or a small tokenizer trained on the spot. One thread.

    tokenizers    each whole text with the reference, as SGLang's worker does
    fastokens     each whole text with the fast backend, where its ids are the same; texts not seen before
    warm          the same texts a second time: fastokens remembers words
    conversation  a chat of 32 KiB, turn after turn, as requests: rendered, encoded with the memo, hashed in blocks of
                  64; in "plain" rendered, encoded whole by the reference, and hashed. Bytes are those of all requests

MB/s is 1e6 bytes of UTF-8 a second; tokens/s beside it. `us` is what the last request of the conversation took.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from kvd.router.tokens.blocks import Scheme, hashes
from kvd.router.tokens.encode import Encoder
from kvd.router.tokens.requests import CHAT, Tokeniser
from kvd.router.tokens.serving import Serving
from kvd.router.tokens.tokenizer import Backend, fastest
from tools.bench._table import Options, Samples, Table, finish, interleave, options, progress, spread, timed
from tools.bench._texts import model_folder, source, texts

CHAT_BYTES, TURN_BYTES = 32 << 10, 1 << 10
SCHEME = Scheme(64)


def main() -> None:
    wanted = options(__doc__)
    with model_folder() as model:
        progress(f"{model.name}; {source()}")
        tokeniser = Tokeniser.open(model, Serving())
        clock = _Clock(tokeniser, model, texts(20 if wanted.quick else 60))
        samples = interleave(clock.cases(), wanted.rounds(3, 9))
        _report(samples, tokeniser, wanted)
        tokeniser.close()


class _Clock:
    """The cases. A backend is made anew for each cold measurement: it must not have seen the texts."""

    def __init__(self, tokeniser: Tokeniser, model: Path, texts: list[str]) -> None:
        self._tokeniser = tokeniser
        self._reference = tokeniser.encoder.reference
        self._texts = texts
        self._bytes = sum(len(text.encode()) for text in texts)
        joined = "\n".join(texts).encode()[:CHAT_BYTES].decode(errors="ignore")
        self._turns = [joined[at : at + TURN_BYTES] for at in range(0, len(joined), TURN_BYTES)]

    def cases(self) -> list[partial[Mapping[str, float]]]:
        return [
            partial(self._whole, "tokenizers"), partial(self._whole, "fastokens"),
            partial(self._conversation, "memo"), partial(self._conversation, "plain"),
        ]  # fmt: skip

    def _whole(self, name: str, number: int) -> Mapping[str, float]:
        backend: Backend = self._reference
        if name == "fastokens":
            backend, note = fastest(self._reference)
            if note:
                return {}
        cold_s, tokens = timed(self._encode, backend)
        warm_s, _ = timed(self._encode, backend)
        return {
            name: self._bytes / cold_s / 1e6, f"{name} tokens": tokens / cold_s,
            f"{name} warm": self._bytes / warm_s / 1e6, f"{name} warm tokens": tokens / warm_s,
        }  # fmt: skip

    def _encode(self, backend: Backend) -> int:
        return sum(len(backend.encode([text])[0]) for text in self._texts)

    def _conversation(self, name: str, number: int) -> Mapping[str, float]:
        # A memo of its own each time, that of an encoder whose backend has seen other texts only.
        backend = fastest(self._reference)[0]
        self._tokeniser.encoder.close()
        template = self._tokeniser.template
        self._tokeniser.encoder = Encoder(self._reference, template.source if template else "", backend=backend)
        ask = self._with_memo if name == "memo" else self._plainly
        total_s, all_bytes, tokens, last_s = 0.0, 0, 0, 0.0
        for turn in range(1, len(self._turns) + 1):
            body = {"messages": self._messages(turn)}
            last_s, count = timed(ask, body)
            total_s, tokens = total_s + last_s, tokens + count
            all_bytes += sum(len(text.encode()) for text in self._turns[:turn])
        figures = {
            f"{name}": all_bytes / total_s / 1e6,
            f"{name} tokens": tokens / total_s,
            f"{name} us": last_s * 1e6,
        }
        return figures

    def _messages(self, turns: int) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(self._turns[:turns])]
        return messages if turns % 2 else [*messages, {"role": "user", "content": "Go on."}]

    def _with_memo(self, body: dict[str, object]) -> int:
        prompt = self._tokeniser.tokenise(CHAT, body)[0]
        assert prompt.ids is not None, prompt.detail
        self._tokeniser.hashes(prompt, SCHEME)
        return len(prompt.ids)

    def _plainly(self, body: dict[str, object]) -> int:
        assert self._tokeniser.template is not None
        text = self._tokeniser.template.render(body["messages"])  # type: ignore[arg-type]
        ids = self._reference.encode([text])[0]
        hashes(ids, SCHEME.names(self._tokeniser.tokenise(CHAT, {})[0].namespace))
        return len(ids)


def _report(samples: Samples, tokeniser: Tokeniser, wanted: Options) -> None:
    table = Table("requests to tokens, one thread", ("case", "MB/s", "tokens/s", "us, last"))
    rows = ("tokenizers", "tokenizers warm", "fastokens", "fastokens warm", "plain", "memo")
    for name in rows:
        label = {"plain": "conversation, plain", "memo": "conversation, memo"}.get(name, name)
        last = spread(samples.rounds[f"{name} us"], 0) if f"{name} us" in samples.rounds else ""
        table.add(label, spread(samples.rounds.get(name), 2), spread(samples.rounds.get(f"{name} tokens"), 0), last)
    backend, note = fastest(tokeniser.encoder.reference)
    table.notes.append(f"requests use {backend.name}{': ' + note if note else ''}")
    figures = {name: round(samples.median(name) or 0, 3) for name in samples.rounds}
    ratios = {
        "fast_vs_tokenizers": samples.ratio("fastokens", "tokenizers"),
        "memo_vs_tokenizers": samples.ratio("memo", "plain"),
    }
    finish("router_tokens", table, wanted, ratios, figures)


if __name__ == "__main__":
    main()
