"""Streams through the router: at once, untouched, cancelled when nobody listens, and whole although a worker dies."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import eventually
from tests.router_answers import CHAT, ask, chat_text, counted, payloads, unchunked
from tests.router_harness import MockWorker, Router, accepted, drain, post, until

# Each request goes to the worker that was chosen longer ago: the default may well send all of them to one.
ALTERNATE = {"routing__policy": "least_busy"}
Pair = tuple[MockWorker, MockWorker]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with MockWorker() as first, MockWorker() as second:
        yield first, second


@pytest.fixture(scope="module")
def running(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(tmp_path_factory.mktemp("router"), *(worker.url for worker in pair), **ALTERNATE) as running:
        yield running


@pytest.fixture
def workers(pair: Pair) -> Pair:
    for worker in pair:
        worker.reset()
    return pair


@pytest.fixture
def router(running: Router, workers: Pair) -> Router:
    """Both workers are asked again: none rests from what the last test did to it."""

    def both_are_asked() -> bool:
        running.talk(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return all(worker.requests for worker in workers)

    eventually(both_are_asked, 30)
    for worker in workers:
        worker.forget()
    return running


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[tuple[Router, Pair]]:
    """A router of its own, and workers that may be killed."""
    with MockWorker() as first, MockWorker() as second, Router(tmp_path, first.url, second.url, **ALTERNATE) as router:
        yield router, (first, second)


def test_an_event_arrives_before_the_next_is_made(router: Router, workers: Pair) -> None:
    for worker in workers:
        worker.set(hold=True)
    with router.connect() as sock:
        sock.sendall(post("/v1/chat/completions", CHAT | {"max_tokens": 3}))
        until(sock, b'"role"')
        serving = next(worker for worker in workers if worker.requests)
        for n in (4, 5, 6):
            serving.step()
            assert b" w%d" % n in until(sock, b"\n\n")


def test_a_stream_passes_byte_for_byte(router: Router, workers: Pair) -> None:
    body = {"text": "a b", "stream": True, "sampling_params": {"max_new_tokens": 20}}
    with socket.create_connection(("127.0.0.1", workers[0].port), 10) as sock:
        sock.sendall(post("/generate", body))
        direct = unchunked(until(sock, b"0\r\n\r\n"))
    through = b""
    while (
        b"x-from" not in through or json.loads(direct.split(b"\n")[0][6:])["meta_info"]["id"].encode() not in through
    ):
        through = router.talk(post("/generate", body, "connection: close"))
    assert unchunked(through) == direct


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_no_longer_served(router: Router, workers: Pair, stream: bool) -> None:
    for worker in workers:
        worker.set(hold=True, silent=not stream)
    with router.connect() as sock:
        sock.sendall(post("/v1/chat/completions", CHAT | {"stream": stream}))
        eventually(lambda: any(worker.requests for worker in workers))
    eventually(lambda: sum(worker.seen["cancelled"] for worker in workers) == 1, 5)
    eventually(lambda: sum(running_at(router, worker) for worker in workers) == 0)


def test_a_client_that_does_not_read_holds_up_its_worker_and_nobody_else(router: Router, workers: Pair) -> None:
    """What it does not take is not fetched: memory does not grow with what workers could send."""
    long = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 1200}}  # each event repeats the text
    with router.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(post("/generate", long))
        until(sock, b"w2")
        assert chat_text(ask(router, "/v1/chat/completions", CHAT | {"max_tokens": 4})) == counted(4, 7)
        assert router.metrics()["clients"] == 2
        received = until(sock, b"\r\n0\r\n\r\n")
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_worker_that_is_gone_is_asked_for_nothing(mortal: tuple[Router, Pair]) -> None:
    router, workers = mortal
    workers[0].kill()
    for _ in range(6):
        assert chat_text(ask(router, "/v1/chat/completions", CHAT | {"max_tokens": 2})) == counted(4, 5)
    assert len(workers[1].requests) == 6


def test_before_the_first_byte_another_worker_is_asked(router: Router, workers: Pair) -> None:
    workers[0].set(drop=True)
    for _ in range(4):
        assert chat_text(ask(router, "/v1/chat/completions", CHAT | {"max_tokens": 2})) == counted(4, 5)
    assert len(workers[0].requests) >= 1
    workers[0].set(drop=False, status=503)
    eventually(lambda: ask(router, "/v1/chat/completions", CHAT | {"max_tokens": 2}) and workers[0].requests, 5)


def test_what_changes_a_worker_is_not_sent_twice(router: Router, workers: Pair) -> None:
    for worker in workers:
        worker.set(drop=True)
    assert router.talk(post("/close_session", b"", "connection: close")).startswith(b"HTTP/1.1 502 ")
    assert sum(len(worker.requests) for worker in workers) == 1


def test_an_order_is_for_every_worker(router: Router, workers: Pair) -> None:
    reply = router.talk(post("/abort_request", {"rid": "a"}, "connection: close"))
    said = json.loads(reply.partition(b"\r\n\r\n")[2])
    assert {name: one["status"] for name, one in said.items()} == {worker.url: 200 for worker in workers}
    assert [[seen["body"] for seen in worker.requests] for worker in workers] == [['{"rid": "a"}']] * 2
    router.talk(post("/abort_request", {"rid": "b"}, "connection: close", f"x-kvd-worker: {workers[1].url}"))
    assert [len(worker.requests) for worker in workers] == [1, 2]
    workers[0].set(drop=True)
    reply = router.talk(post("/flush_cache", b"", "connection: close"))
    assert reply.startswith(b"HTTP/1.1 502 ")
    said = json.loads(reply.partition(b"\r\n\r\n")[2])
    assert [said[worker.url]["status"] for worker in workers] == [502, 200]


def test_when_all_workers_are_gone_the_client_is_told_when_to_come_back(mortal: tuple[Router, Pair]) -> None:
    router, workers = mortal
    for worker in workers:
        worker.kill()
    reply = router.talk(post("/v1/chat/completions", CHAT, "connection: close"))
    assert reply.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: " in reply
    assert b"no other worker can be reached" in reply


def running_at(router: Router, worker: MockWorker) -> float:
    return router.metrics()[f'steering_running{{worker="{worker.url}"}}']


STREAMS = {
    "chat": ("/v1/chat/completions", CHAT | {"max_tokens": 12}),
    "chat with usage": ("/v1/chat/completions", CHAT | {"max_tokens": 12, "stream_options": {"include_usage": True}}),
    "completions": ("/v1/completions", {"prompt": "one two", "stream": True, "max_tokens": 12}),
    "completions by ids": (
        "/v1/completions", {"prompt": [7, 8], "stream": True, "max_tokens": 12, "return_token_ids": True},
    ),
    "generate": ("/generate", {"text": "one two", "stream": True, "sampling_params": {"max_new_tokens": 12}}),
    "generate by ids": ("/generate", {"input_ids": [7, 8], "stream": True, "sampling_params": {"max_new_tokens": 12}}),
}  # fmt: skip


COUNTED = {"chat", "chat with usage", "completions"}  # whose events do not say how many tokens they bring


def comparable(events: list[Any]) -> list[Any]:
    """Without the names of processes; streams of one answer must name one."""
    names = {event.get("id") or event["meta_info"]["id"] for event in events if isinstance(event, dict)}
    assert len(names) == 1, "one stream, one id"
    return json.loads(json.dumps(events).replace(names.pop(), "ID"))


@pytest.mark.parametrize(("name", "torn"), [*((name, False) for name in STREAMS), ("chat", True), ("generate", True)])
def test_a_stream_goes_on_when_its_worker_breaks_off(router: Router, workers: Pair, name: str, torn: bool) -> None:
    """To the client it is the stream that it would have been."""
    path, body = STREAMS[name]
    expected = comparable(ask(router, path, body))
    next_one(workers).set(die_after=5, torn=torn)
    assert comparable(ask(router, path, body)) == expected
    assert all(worker.requests for worker in workers)
    counts = [json.loads(one["body"]) for each in workers for one in each.requests if one["target"] == "/tokenize"]
    assert [count.get("model") for count in counts] == [body.get("model")] * (name in COUNTED), "by its own tokens"


def next_one(workers: Pair) -> MockWorker:
    """Who is asked next, when one of them was asked once."""
    return workers[1] if workers[0].requests else workers[0]


def test_a_stream_goes_on_when_its_worker_is_killed(mortal: tuple[Router, Pair]) -> None:
    router, workers = mortal
    path, body = STREAMS["chat"]
    expected = comparable(ask(router, path, body))
    victim = next_one(workers)
    victim.set(die_after=5, exits=True)
    assert comparable(ask(router, path, body)) == expected
    assert victim.process.wait(5) == 9
    assert router.metrics()["continued_total"] == 1


def test_a_stream_of_pieces_goes_on_too(router: Router, workers: Pair) -> None:
    """/generate of a worker that sends only what is new."""
    for worker in workers:
        worker.set(incremental=True)
    path, body = STREAMS["generate by ids"]
    expected = comparable(ask(router, path, body))
    next_one(workers).set(die_after=5)
    assert comparable(ask(router, path, body)) == expected


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("name", ["generate", "generate by ids"])
def test_a_stream_that_said_one_event_goes_on_too(router: Router, workers: Pair, name: str, incremental: bool) -> None:
    """That one does not tell whether each repeats the text: the rest does."""
    for worker in workers:
        worker.set(incremental=incremental)
    path, body = STREAMS[name]
    expected = comparable(ask(router, path, body))
    next_one(workers).set(die_after=1)
    assert comparable(ask(router, path, body)) == expected


def test_a_stream_whose_rest_is_one_event_ends_with_an_error(router: Router, workers: Pair) -> None:
    body = {"text": "one two", "stream": True, "sampling_params": {"max_new_tokens": 2}}
    ask(router, "/generate", body)
    next_one(workers).set(die_after=1)
    said, error = ask(router, "/generate", body)
    assert said["text"] == " w3"
    assert "one event does not tell" in error["error"]["message"]


CUT = {
    "penalties": ("/v1/chat/completions", CHAT | {"max_tokens": 12, "frequency_penalty": 1.0}),
    "tools": ("/v1/chat/completions", CHAT | {"max_tokens": 12, "tools": [{"type": "function"}]}),
    "a field of tomorrow": ("/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 12, "new": 1}),
    "a grammar": ("/generate", {"text": "a", "stream": True, "sampling_params": {"regex": "a*"}}),
    "messages": ("/v1/messages", CHAT | {"max_tokens": 12}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "torn"), [*((name, False) for name in CUT), ("messages", True)])
def test_a_stream_that_cannot_go_on_says_so(router: Router, workers: Pair, name: str, torn: bool) -> None:
    path, body = CUT[name]
    for worker in workers:
        worker.set(die_after=4, torn=torn)
    events = ask(router, path, body)  # whole events, and a whole body: `ask` sees to it
    assert "error" in events[-1]
    assert "left in the middle" in events[-1]["error"]["message"]
    assert sum(len(worker.requests) for worker in workers) == 1, "nobody else was asked"


def test_usage_is_right_without_a_limit(router: Router, workers: Pair) -> None:
    """The text that was said is counted, although nothing else depends on it."""
    path, body = "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}}
    ask(router, path, body)
    next_one(workers).set(die_after=5)
    events = ask(router, path, body)
    assert chat_text(events[:-1]) == counted(4, 15), "four words, and as many as a worker says without a limit"
    assert events[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_nothing_is_generated_past_the_end_of_an_answer(router: Router, workers: Pair) -> None:
    path, body = "/v1/chat/completions", CHAT | {"max_tokens": 3, "stream_options": {"include_usage": True}}
    for worker in workers:
        worker.set(die_after=4)  # the role and three words, the last with its reason; the usage does not come
    events = ask(router, path, body)
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, None, "length"]
    assert "usage is missing" in events[-1]["error"]["message"]


def test_an_event_of_the_rest_that_is_too_long_ends_the_stream(tmp_path: Path) -> None:
    """With an error event, and the router goes on: nothing was passed of that event."""

    def generated(text: str, ids: list[int]) -> bytes:
        meta = {"id": "a", "prompt_tokens": 1, "completion_tokens": len(ids), "finish_reason": None}
        return b"data: %b\n\n" % json.dumps({"text": text, "output_ids": ids, "meta_info": meta}).encode()

    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        urls = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
        with Router(tmp_path, *urls, **ALTERNATE) as router, router.connect() as sock:
            sock.sendall(post("/generate", {"text": "a", "stream": True}, "connection: close"))
            with accepted(listening) as first:
                said = generated("b", [1]) + generated("bc", [1, 2])
                first.sendall(head + b"%x\r\n%b\r\n" % (len(said), said))
                until(sock, b'"bc"')
            with accepted(listening) as second:
                large = generated("d" * (3 << 20), [3])
                with contextlib.suppress(ConnectionError):  # it is not read to its end
                    second.sendall(head + b"%x\r\n%b" % (len(large), large))
                body = b"".join(line for line in drain(sock).split(b"\r\n") if line.startswith(b"data: "))
            assert "too long" in payloads(body)[0]["error"]["message"]
            assert router.metrics()["continued_total"] == 1


def test_an_answer_that_is_no_stream_is_visibly_cut(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Router(tmp_path, url) as router, router.connect() as sock:
            sock.sendall(post("/generate", {"text": "a"}))
            with accepted(listening) as upstream:
                upstream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
                reply = until(sock, b"half")
            assert b"content-length: 100" in reply
            assert drain(sock) == b""


@pytest.mark.parametrize("processes", [1, 2])
def test_two_hundred_streams_at_once(workers: Pair, tmp_path: Path, processes: int) -> None:
    for worker in workers:
        worker.set(pace_s=0.01)
    with Router(tmp_path, *(worker.url for worker in workers), listen__processes=processes) as router:
        socks = [router.connect() for _ in range(200)]
        for n, sock in enumerate(socks):
            body = CHAT | {"max_tokens": 20, "messages": [{"role": "user", "content": "word " * (n + 1)}]}
            sock.sendall(post("/v1/chat/completions", body))
        for n, sock in enumerate(socks):
            with sock:
                body = unchunked(until(sock, b"0\r\n\r\n"))
                assert chat_text(payloads(body)) == counted(n + 2, n + 21)
