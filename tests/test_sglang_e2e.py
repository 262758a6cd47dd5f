"""A real SGLang answers the same without kvd, with a kvd that is cold, and from kvd's pages.

Every prompt of the tree is asked of each: the output must be equal token by token, every page must be stored once,
and every page that can come from kvd must.
"""

from collections.abc import Iterator, Sequence

import pytest

from tests.harness import Daemon
from tests.sglang_node import (
    PAGE_TOKENS,
    TREE,
    Answers,
    Crowd,
    Prompt,
    ask,
    fill,
    needs_sglang,
    pages_held,
    pages_of,
    reference_answers,
    reusable,
    running,
    salt,
    wrong,
)
from tools.sglang_cpu.server import LAYOUTS, SglangServer

pytestmark = [needs_sglang, pytest.mark.timeout(900)]

Node = tuple[Daemon, SglangServer]
CLIENTS = 8
THINNED = TREE[::2]  # for the slow variants: half of the leaves


@pytest.fixture(scope="module")
def reference() -> Answers:
    return reference_answers()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with running("e2e", meanwhile=reference_answers) as both:
        yield both


def same_answers_cold_and_from_kvd(
    node: Node, prompts: Sequence[Prompt], reference: Answers, page_tokens: int = PAGE_TOKENS
) -> None:
    kvd, server = node
    before = pages_held(kvd)
    clients = [prompts[client::CLIENTS] for client in range(CLIENTS)]
    cold = Crowd(server).ask(*clients).join()
    server.flush_cache()
    assert not wrong(cold, reference)
    # The last token of an answer was never an input, so it has no KV.
    seen = [(*prompt, *answer.output_ids[:-1]) for prompt, answer in cold]
    assert pages_held(kvd) - before == pages_of(seen, page_tokens), "each page is stored, once"

    warm = Crowd(server).ask(*clients).join()
    assert len(cold) == len(warm) == len(prompts)
    assert not wrong(warm, reference)
    assert all(answer.cached.total == reusable(prompt, page_tokens) for prompt, answer in warm)
    # Nothing but kvd had them. Clients that meet at a page may both be given it by kvd.
    wanted = page_tokens * pages_of([prompt[:-1] for prompt in prompts], page_tokens)
    assert sum(answer.cached.storage for _, answer in warm) >= wanted
    assert kvd.faults() == []


def test_eight_at_a_time_get_the_same_answers_without_kvd_and_with_it(node: Node, reference: Answers) -> None:
    assert len(TREE) >= 50
    same_answers_cold_and_from_kvd(node, TREE, reference)


def test_a_worker_without_a_page_of_its_own_left_continues_a_conversation_from_kvd(
    node: Node, reference: Answers
) -> None:
    """The second turn's prompt extends the first turn's prompt and answer."""
    _, server = node
    mine = salt()
    ((prompt, first),) = fill(server, [TREE[1]], cache_salt=mine)
    follow_up = (*prompt, *first.output_ids, *TREE[0])
    cold = ask(server, follow_up, cache_salt=salt())
    continued = ask(server, follow_up, cache_salt=mine)
    assert continued.output_ids == cold.output_ids
    assert cold.cached.total == 0
    assert continued.cached.storage == reusable(prompt + tuple(first.output_ids), PAGE_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("page_tokens", [16, 64])
@pytest.mark.parametrize(("layout", "io_backend"), LAYOUTS)
def test_every_host_layout_gives_the_same_answers(
    layout: str, io_backend: str, page_tokens: int, reference: Answers
) -> None:
    with running(f"{layout}-{page_tokens}", layout=layout, io_backend=io_backend, page_size=page_tokens) as node:
        same_answers_cold_and_from_kvd(node, THINNED, reference, page_tokens)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "io_backend"), [("layer_first", "kernel"), ("page_first_direct", "direct")])
def test_the_generic_interface_gives_the_same_answers(layout: str, io_backend: str, reference: Answers) -> None:
    with running(f"generic-{layout}", layout=layout, io_backend=io_backend, v1=False) as node:
        same_answers_cold_and_from_kvd(node, THINNED, reference)


@pytest.mark.slow
def test_three_ranks_store_their_shards_of_each_page_and_get_them_back(reference: Answers) -> None:
    with running("tp3", ranks=3, tp_size=3) as node:
        same_answers_cold_and_from_kvd(node, THINNED, reference)
        workers = node[0].status().workers
        assert len({worker.pid for worker in workers}) == 3
        assert len({worker.shard for worker in workers}) == 3
