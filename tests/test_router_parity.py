"""A worker that makes other tokens is found out, with what and where; one that cannot be asked is not believed."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvd.errors import Unavailable
from kvd.router.asking import MOST_BYTES, Asker
from kvd.router.steering import Worker
from kvd.router.tokens.parity import EVENTS, OLD_AFTER_S, Parity, Verdict
from kvd.router.tokens.probe import Probe, tokenize
from kvd.router.tokens.requests import CHAT, Tokeniser
from kvd.router.tokens.serving import Serving
from tests import router_models


@pytest.fixture(scope="module")
def tokeniser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokeniser]:
    made = router_models.with_special(router_models.byte_level())
    model = Tokeniser.open(router_models.folder(tmp_path_factory.mktemp("model"), made), Serving())
    yield model
    model.close()


Answer = Callable[[dict[str, Any]], bytes]


def said(tokens: Any, status: str = "200 OK") -> bytes:
    body = json.dumps({"tokens": tokens, "count": 0, "max_model_len": 1}).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def honest(tokeniser: Tokeniser) -> Answer:
    """A worker with the same folder."""

    def answer(body: dict[str, Any]) -> bytes:
        ids = tokeniser.tokenise(CHAT, body)[0].ids if "messages" in body else tokeniser.text(body["prompt"])
        return said(list(ids or []))

    return answer


@asynccontextmanager
async def worker(answer: Answer, asked: list[bytes] | None = None) -> AsyncIterator[int]:
    """An HTTP server with one endpoint; gives its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if asked is not None:
            asked.append(head)
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        writer.write(answer(json.loads(await reader.readexactly(int(length.split(b":")[1])))))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def asking(port: int, key: bytes | None = None, most_bytes: int = MOST_BYTES) -> AsyncIterator[Asker]:
    asker = Asker(Worker(f"http://127.0.0.1:{port}", "127.0.0.1", port), key, most_bytes)
    try:
        yield asker
    finally:
        asker.close()
        await asyncio.sleep(0)


def verdict(tokeniser: Tokeniser, answer: Answer) -> Verdict:
    async def ask() -> Verdict:
        async with worker(answer) as port, asking(port, most_bytes=1 << 20) as asker:
            return await Probe(asker, tokeniser).once()

    return asyncio.run(ask())


def test_a_worker_with_the_same_folder_is_equal(tokeniser: Tokeniser) -> None:
    found = verdict(tokeniser, honest(tokeniser))
    assert found.state == "equal", found
    assert found.credit
    assert not found.unsure


def test_a_worker_with_another_tokenizer_differs_in_plain_text(tokeniser: Tokeniser) -> None:
    def answer(body: dict[str, Any]) -> bytes:
        return said([7, *tokeniser.text(str(body.get("prompt")))])

    found = verdict(tokeniser, answer)
    assert (found.state, found.what, found.credit) == ("differs", "plain text", False)
    assert found.where.startswith("from 0: ")
    assert "tokenizer.json" in found.remedy


def test_a_worker_with_another_template_differs_in_chats_alone(tokeniser: Tokeniser) -> None:
    truth = honest(tokeniser)

    def answer(body: dict[str, Any]) -> bytes:
        return truth({**body, "tools": None}) if "messages" in body else truth(body)

    found = verdict(tokeniser, answer)
    assert (found.state, found.what) == ("differs", "chat with tools")
    assert "template" in found.remedy


@pytest.mark.parametrize(
    "raw",
    [
        said("no list"), said([[1, 2]]), said([1], "500 Oops"), said([1], "404 Not Found"), b"nonsense\r\n\r\n", b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b'HTTP/1.1 200 OK\r\n\r\n{"tokens": "\xff"}', b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 5000,
    ],
)  # fmt: skip
def test_an_answer_that_is_none_leaves_the_worker_unknown(tokeniser: Tokeniser, raw: bytes) -> None:
    found = verdict(tokeniser, lambda body: raw)
    assert (found.state, found.credit) == ("unknown", False)
    assert "/tokenize" in found.what
    assert found.remedy


def test_an_answer_without_end_is_given_up(tokeniser: Tokeniser) -> None:
    found = verdict(tokeniser, lambda body: b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (2 << 20))
    assert (found.state, "more than" in found.what) == ("unknown", True)


def test_nobody_there_is_unavailable() -> None:
    async def ask() -> None:
        async with asking(1) as asker:
            await tokenize(asker, {"prompt": "x"})

    with pytest.raises(Unavailable):
        asyncio.run(ask())


def test_the_workers_api_key_is_sent(tokeniser: Tokeniser) -> None:
    asked: list[bytes] = []

    async def ask() -> list[int]:
        async with worker(lambda body: said([1, 2]), asked) as port, asking(port, b"secret") as asker:
            return await tokenize(asker, {"prompt": "x"})

    assert asyncio.run(ask()) == [1, 2]
    assert b"\r\nauthorization: Bearer secret\r\n" in asked[0]


def test_what_was_heard_long_ago_is_not_believed() -> None:
    parity = Parity({"a": [1, 2], "b": [3], "c": None})
    assert parity.verdict(0.0).state == "unknown"
    parity.heard("a", [1, 2], now=10.0)
    assert parity.verdict(11.0).state == "unknown", "b was not heard"
    parity.heard("b", [3], now=20.0)
    assert (parity.verdict(21.0).state, parity.verdict(21.0).unsure) == ("equal", ("c",))
    parity.unheard("gone")
    assert parity.verdict(22.0).state == "equal"
    late = parity.verdict(10.0 + OLD_AFTER_S)
    assert late.state == "unknown"
    assert "gone" in late.what


def test_a_worker_that_differs_is_equal_again_when_its_next_answer_is() -> None:
    parity = Parity({"a": [1, 2, 3]})
    parity.heard("a", [1, 5, 3], now=1.0)
    assert parity.verdict(1.0).where == "from 1: [2, 3] here, [5, 3] there"
    parity.heard("a", [1, 2], now=2.0)
    assert parity.verdict(2.0).where == "from 2: [3] here, [] there"
    parity.heard("a", [1, 2, 3], now=3.0)
    assert parity.verdict(3.0).state == "equal"


def test_block_hashes_of_events_count_too() -> None:
    parity = Parity({"a": [1]})
    parity.heard("a", [1], now=1.0)
    parity.announced([10, 20], [10, 21], now=2.0)
    assert (parity.verdict(2.0).state, parity.verdict(2.0).what) == ("differs", EVENTS)
    assert "page size" in parity.verdict(2.0).remedy
    parity.announced([10, 20], [10, 20], now=3.0)
    assert parity.verdict(3.0).state == "equal"


def test_a_model_that_has_no_tokens_here_is_never_equal(tmp_path: Path) -> None:
    assert Parity({"a": None}).verdict(1.0).state == "unknown"
