"""The shared tier in a bucket: moto's server on the loopback interface, spoken to as to any S3."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from pyarrow import fs

from kvd.storage.shared import SharedTier
from kvd.storage.tier import TierError
from tests.harness import eventually
from tests.tier_samples import get, held, put, sample

SERVER = Path(sys.executable).with_name("moto_server")
MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """host:port"""
    if not SERVER.exists():
        pytest.skip("moto is not installed: pip install 'moto[server]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [SERVER, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: _listens(port), 60, "moto listens")
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def client(server: str) -> fs.S3FileSystem:
    """It keeps descriptors, so there is one for all tests, and it is used before the first."""
    keys = {"access_key": "key", "secret_key": "secret", "region": "us-east-1"}
    s3 = fs.S3FileSystem(endpoint_override=server, scheme="http", allow_bucket_creation=True, **keys)
    s3.create_dir("kvd-warm")
    with s3.open_output_stream("kvd-warm/up") as stream:
        stream.write(b"up")
    return s3


@pytest.fixture
def bucket(client: fs.S3FileSystem, server: str, request: pytest.FixtureRequest) -> tuple[fs.S3FileSystem, str]:
    """The client, and the URI of a place in a bucket of this test's own."""
    name = f"kvd-{xxhash.xxh3_64_hexdigest(request.node.name.encode())}"
    client.create_dir(name)
    return client, f"s3://key:secret@{name}/kv?endpoint_override={server}&scheme=http&region=us-east-1"


Node = Callable[..., SharedTier]


@pytest.fixture
def node(bucket: tuple[Any, str]) -> Iterator[Node]:
    opened: list[SharedTier] = []

    def start(name: str, **settings: Any) -> SharedTier:
        given = {"quota_bytes": 24 * MIB, "file_bytes": 4 * MIB, "poll_s": 0, "grace_s": 0} | settings
        opened.append(SharedTier(bucket[1], name, **given))
        return opened[-1]

    yield start
    for tier in opened:
        assert not tier.check()
        tier.close()


def objects(bucket: tuple[fs.S3FileSystem, str]) -> list[fs.FileInfo]:
    root = bucket[1].split("@")[1].split("?")[0]
    found = bucket[0].get_file_info(fs.FileSelector(root, recursive=True))
    return [info for info in found if info.type == fs.FileType.File]


def test_what_one_node_stores_another_reads(node: Node) -> None:
    one, two = node("a"), node("b")
    samples = [sample(n, 1 + 30_000 * n, 1 + n % 3) for n in range(6)]
    assert put(one, *samples) == [True] * 6
    assert two.news() == ([s.page.name for s in samples], [])
    assert get(two, *samples) == samples
    two.remove([samples[2].page.name])
    assert one.news().left == [samples[2].page.name]
    assert held(node("c")) == {s.page.name for s in samples} - {samples[2].page.name}


def test_small_objects_are_merged_and_old_ones_deleted(node: Node, bucket: tuple[Any, str]) -> None:
    one, two = node("a"), node("b")
    samples = [sample(n, 50_000) for n in range(9)]
    for what in samples:
        put(one, what)
    two.news()
    for _ in range(2):
        assert one.news() == ([], [])
    assert len(objects(bucket)) == 1
    assert one.counters["merged files"] == 9
    assert get(two, *samples) == [None] * 9, "it has not heard of the new one"
    two.news()
    assert get(two, *samples) == samples


def test_more_than_one_upload_part(node: Node) -> None:
    samples = [sample(n, 6 * MIB) for n in range(3)]
    one = node("a", quota_bytes=64 * MIB, file_bytes=64 * MIB)
    assert put(one, *samples) == [True] * 3
    assert get(node("b", quota_bytes=64 * MIB), *samples) == samples


def test_a_quota_holds_for_all_nodes_together(node: Node, bucket: tuple[Any, str]) -> None:
    one, two = node("a", quota_bytes=2 * MIB), node("b", quota_bytes=2 * MIB)
    for n in range(6):
        tier = (one, two)[n % 2]
        tier.news()
        assert put(tier, sample(n, 500_000)) == [True]
    assert sum(info.size for info in objects(bucket)) <= 2 * MIB
    assert get(two, sample(0, 500_000), sample(5, 500_000)) == [None, sample(5, 500_000)]


def test_an_object_that_vanishes_or_is_cut_is_a_miss(node: Node, bucket: tuple[fs.S3FileSystem, str]) -> None:
    tier = node("a", poll_s=99)
    for n in range(3):
        put(tier, sample(n))
    assert get(tier, sample(0)) == [sample(0)]
    first, second, _ = sorted(info.path for info in objects(bucket))
    bucket[0].delete_file(first)
    with bucket[0].open_input_file(second) as stream:
        data = stream.read()
    with bucket[0].open_output_stream(second) as stream:
        stream.write(data[:5000])
    assert get(tier, sample(0), sample(1), sample(2)) == [None, None, sample(2)]
    assert set(tier.news().left) == {sample(0).page.name, sample(1).page.name}
    assert node("b").counters["truncated"] == 1


def test_a_server_that_is_gone_is_a_tier_error(server: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = probe.getsockname()[1]
    uri = f"s3://key:secret@nowhere/kv?endpoint_override=127.0.0.1:{nobody}&scheme=http&region=us-east-1"
    with pytest.raises(TierError):
        SharedTier(uri, "a", MIB)
    missing = f"s3://key:secret@no-such-bucket/kv?endpoint_override={server}&scheme=http&region=us-east-1"
    tier = SharedTier(missing, "a", MIB)  # to S3, a prefix without objects
    with pytest.raises(TierError):
        put(tier, sample(1))
    tier.close()
