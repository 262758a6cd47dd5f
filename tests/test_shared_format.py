"""The files of a shared tier for others: what docs/shared-tier.md promises to whoever has pyarrow and not us."""

import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import xxhash

from tests.shared_folder import Node, files, nodes
from tests.tier_samples import put, sample


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with nodes(tmp_path / "shared") as start:
        yield start


class TestForOthers:
    def test_the_documented_snippet_reads_a_file(self, node: Node, tmp_path: Path) -> None:
        samples = [sample(n, 5000 + n, 1 + n % 3) for n in range(5)]
        put(node("a"), *samples)
        text = (Path(__file__).parents[1] / "docs/shared-tier.md").read_text()
        snippet = text.split("```python\n")[1].split("```")[0]
        alone = [sys.executable, "-I", "-c", f"import sys; sys.modules['kvd'] = None\n{snippet}"]
        shown = subprocess.run([*alone, files(tmp_path)[0]], check=True, capture_output=True, text=True).stdout
        assert shown.splitlines() == [
            "a stored 5 pages",
            *(f"{s.page.key.hex()} 16 tokens {s.page.shards} shards {len(b''.join(s.data))} bytes" for s in samples),
        ]

    def test_every_column_is_what_was_put(self, node: Node, tmp_path: Path) -> None:
        samples = [sample(n, 4096 * n + 4096, 1 + n % 2) for n in range(4)]
        put(node("a"), *samples)
        with pa.memory_map(str(files(tmp_path)[0])) as source:
            table = pa.ipc.open_file(source).read_all()
            table.validate(full=True)
            for row, (page, data) in zip(table.to_pylist(), samples, strict=True):
                assert row.pop("payload") == b"".join(data)
                assert row.pop("stamp") >> 20 == pytest.approx(time.time() * 1000, abs=60_000)
                expected = page._asdict() | {"checksums": list(page.checksums)}
                del expected["kind"]  # a node's own business
                assert row == expected
            payload = table["payload"].chunk(3).buffers()[2]
            assert payload is not None
            assert payload.address % 4096 == 0, "payloads lie at page boundaries"

    def test_the_bytes_are_where_the_module_draws_them(self, node: Node, tmp_path: Path) -> None:
        what = sample(7, 5000, 2)
        put(node("a"), what)
        data = files(tmp_path)[0].read_bytes()
        (footer,) = struct.unpack("<i", data[-10:-6])
        end = len(data) - 10 - footer
        magic, version, count, checksums, zero = struct.unpack_from("<8sIIII", data, end - 40)
        assert (magic, version, count, checksums, zero) == (b"KVDINDEX", 1, 1, 2, 0)
        start = end - 40 - 32 - 120
        assert data[end - 16 : end] == xxhash.xxh3_128_digest(data[start : end - 16])
        namespace, key, parent, *numbers = struct.unpack_from("<16s32s32sQQQIIH6x", data, start)
        length, offset, _, tokens, first, shards = numbers
        assert (namespace, key, parent, length) == what.page[:4]
        assert (tokens, first, shards) == (16, 0, 2)
        assert data[start + 120 : start + 152] == b"".join(what.page.checksums)
        assert offset % 4096 == 0
        assert data[offset : offset + 10_000] == b"".join(what.data)
        assert data[:8] == b"ARROW1\0\0"
        assert data[-6:] == b"ARROW1"
