"""The shared tier in a bucket, on a server with all of S3's promises and on one that ignores preconditions."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from botocore.exceptions import ClientError, ResponseStreamingError

from kvd.storage import failpoints
from kvd.storage.shared import SharedTier
from kvd.storage.shared.sharedtier import open_depot
from kvd.storage.tier import TierError
from tests.failpoint_names import failpoint_names
from tests.s3_server import SERVERS, Place, Server, free_port, s3_server
from tests.shared_folder import PollingTier
from tests.tier_samples import get, held, put, sample

MIB = 1 << 20
Node = Callable[..., SharedTier]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_server(request.param, tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> Place:
    return server.make_bucket(request.node.name)


@pytest.fixture
def node(bucket: Place) -> Iterator[Node]:
    opened: list[SharedTier] = []

    def start(name: str, **settings: Any) -> SharedTier:
        given = {"quota_bytes": 24 * MIB, "file_bytes": 4 * MIB, "poll_s": 0, "grace_s": 0} | settings
        opened.append(PollingTier(bucket.uri, name, **given))
        return opened[-1]

    yield start
    for tier in opened:
        assert not tier.check()
        tier.close()


def test_what_one_node_stores_another_reads(node: Node) -> None:
    one, two = node("a"), node("b")
    samples = [sample(n, 1 + 30_000 * n, 1 + n % 3) for n in range(6)]
    assert put(one, *samples) == [True] * 6
    assert two.news() == ([s.page.name for s in samples], [])
    assert get(two, *samples) == samples
    two.remove([samples[2].page.name])
    assert one.news().left == [samples[2].page.name]
    assert held(node("c")) == {s.page.name for s in samples} - {samples[2].page.name}


def test_small_objects_are_merged_and_old_ones_deleted(node: Node, bucket: Place) -> None:
    one, two = node("a"), node("b")
    samples = [sample(n, 50_000) for n in range(9)]
    for what in samples:
        put(one, what)
    two.news()
    for _ in range(2):
        assert one.news() == ([], [])
    assert len(bucket.objects()) == 1
    assert one.counters["merged files"] == 9
    assert get(two, *samples) == [None] * 9, "it has not heard of the new one"
    two.news()
    assert get(two, *samples) == samples


def test_more_than_one_upload_part(node: Node) -> None:
    samples = [sample(n, 6 * MIB) for n in range(3)]
    one = node("a", quota_bytes=64 * MIB, file_bytes=64 * MIB)
    assert put(one, *samples) == [True] * 3
    assert get(node("b", quota_bytes=64 * MIB), *samples) == samples


def test_a_quota_holds_for_all_nodes_together(node: Node, bucket: Place) -> None:
    one, two = node("a", quota_bytes=2 * MIB), node("b", quota_bytes=2 * MIB)
    for n in range(6):
        tier = (one, two)[n % 2]
        tier.news()
        assert put(tier, sample(n, 500_000)) == [True]
    assert sum(bucket.objects().values()) <= 2 * MIB
    assert get(two, sample(0, 500_000), sample(5, 500_000)) == [None, sample(5, 500_000)]


def test_an_object_that_vanishes_or_is_cut_is_a_miss(node: Node, bucket: Place) -> None:
    tier = node("a", poll_s=99)
    for n in range(3):
        put(tier, sample(n))
    assert get(tier, sample(0)) == [sample(0)]
    first, second, _ = sorted(bucket.objects())
    bucket.delete(first)
    bucket.write(second, bucket.read(second)[:5000])
    assert get(tier, sample(0), sample(1), sample(2)) == [None, None, sample(2)]
    assert set(tier.news().left) == {sample(0).page.name, sample(1).page.name}
    assert node("b").counters["truncated"] == 1


def test_one_of_the_servers_ignores_preconditions(server: Server, bucket: Place, request: Any) -> None:
    """What the next two tests stand on."""
    bucket.write("kv/once", b"first")
    refused = []
    for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"0123"'}):
        try:
            bucket.write("kv/once", b"second", **condition)
        except ClientError:
            refused.append(condition)
    assert len(refused) == (2 if "moto" in request.node.name else 0)


def test_two_writers_of_one_name_leave_one_of_the_two(bucket: Place) -> None:
    """Names are never used twice; were one, a reader would get the one file or the other, whole."""
    versions = [bytes([number]) * (6 * MIB + number) for number in (1, 2)]
    over = threading.Event()

    def write(data: bytes) -> None:
        depot = open_depot(bucket.uri)
        for _ in range(4):
            depot.publish("a/same.pages.arrow", [memoryview(data)], len(data), direct=False)
        depot.close()

    def read() -> int:
        seen = 0
        while not over.is_set():
            if "kv/a/same.pages.arrow" in bucket.objects():
                with suppress(
                    ResponseStreamingError
                ):  # shorter than was said: juicefs on a busy machine. It is noticed
                    assert bucket.read("kv/a/same.pages.arrow") in versions
                    seen += 1
        return seen

    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, version) for version in versions]
        try:
            for writer in writers:
                writer.result()
        finally:
            over.set()
        assert reader.result()
    assert bucket.read("kv/a/same.pages.arrow") in versions


def test_two_daemons_of_one_name_do_no_harm(node: Node) -> None:
    twins = node("a"), node("a")
    samples = [sample(n) for n in range(32)]

    def work(which: int) -> None:
        for what in samples[which::2]:
            assert put(twins[which], what) == [True]
            twins[which].news()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 1)))
    for tier in twins:
        tier.news()
        assert get(tier, *samples) == samples
    assert get(node("late"), *samples) == samples


@pytest.mark.parametrize("step", failpoint_names("shared", "bucket."))
def test_an_error_in_any_step_is_a_tier_error_or_a_miss(node: Node, bucket: Place, step: str) -> None:
    tier = node("a")
    samples = [sample(n) for n in range(8)]
    for what in samples:
        put(tier, what)
    failpoints.arm(f"{step}:1+:eio")
    try:
        for attempt in (lambda: put(tier, sample(99)), lambda: tier.remove([samples[0].page.name]), tier.news):
            with suppress(TierError):
                attempt()
        assert set(get(tier, *samples)) <= {None, *samples}
    finally:
        failpoints.arm("")
    tier.news()
    assert get(tier, *samples[1:]) == samples[1:], "trouble that passes loses nothing"
    assert put(tier, sample(99)) == [True]
    late = node("late")
    assert get(late, *samples[1:]) == samples[1:]
    assert not {"truncated", "damaged", "foreign"} & set(late.counters), "no half of an object was left"


def test_a_server_that_is_gone_is_a_tier_error(server: Server) -> None:
    gone = server._replace(address=f"127.0.0.1:{free_port()}")
    with pytest.raises(TierError):
        SharedTier(gone.uri("nowhere/kv"), "a", MIB)
    tier = SharedTier(server.uri("no-such-bucket/kv"), "a", MIB)  # to S3, a prefix without objects
    with pytest.raises(TierError):
        put(tier, sample(1))
    tier.close()
