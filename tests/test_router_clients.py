"""The official clients, through the router."""

from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest

from tests.router_harness import MockWorker, Router


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with MockWorker() as worker, Router(tmp_path_factory.mktemp("router"), worker.url) as running:
        yield running


@pytest.fixture
def client(router: Router) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as made:
        yield made


MESSAGES = [{"role": "user", "content": "one two three"}]


def test_openai_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=3)
    assert reply.choices[0].message.content == " w4 w5 w6"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3


def test_openai_streams(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == " w4 w5 w6"
    text = client.completions.create(model="mock", prompt="one two", max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in text) == " w3 w4 w5"


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[Router]:
    """A router whose only worker dies in the middle of its first answer."""
    with MockWorker(die_after=4, exits=True) as worker, Router(tmp_path, worker.url) as running:
        yield running


def test_a_stream_that_dies_is_an_error_to_openais_client(dying: Router) -> None:
    with openai.OpenAI(base_url=f"{dying.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="mock", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="no other worker"):
            list(stream)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="mock", messages=MESSAGES)


def test_a_stream_that_dies_is_an_error_to_anthropics_client(dying: Router) -> None:
    with (
        anthropic.Anthropic(base_url=dying.url, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError, match="left in the middle"),
        client.messages.stream(model="mock", messages=MESSAGES, max_tokens=9) as stream,
    ):
        list(stream.text_stream)


def test_anthropic_messages(router: Router) -> None:
    with anthropic.Anthropic(base_url=router.url, api_key="none", max_retries=0) as client:
        reply = client.messages.create(model="mock", messages=MESSAGES, max_tokens=3)
        assert reply.content[0].text == " w4 w5 w6"
        with client.messages.stream(model="mock", messages=MESSAGES, max_tokens=3) as stream:
            assert "".join(stream.text_stream) == " w4 w5 w6"
